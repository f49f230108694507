"""Packing symmetric matrices is exact and leaves no gap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dngd.curvature import symmetric
from tests.helpers.mutants import assert_caught


@pytest.fixture(params=["gathered", "by blocks"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by blocks":
        monkeypatch.setattr(symmetric, "MOST_GATHERED", 0)


def law_round_trip(d: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(d, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    matrix = matrix + matrix.T
    packed = symmetric.pack_symmetric(matrix)
    assert packed.shape == (symmetric.packed_size(d),)
    assert torch.equal(symmetric.unpack_symmetric(packed, d), matrix)
    assert torch.equal(symmetric.packed_diagonal(packed, d), matrix.diagonal())
    # Every entry of the triangle stands in the packed form exactly once.
    numbers = torch.arange(1.0, d * d + 1, dtype=torch.float64).view(d, d)
    numbers = numbers.tril() + numbers.tril(-1).T
    assert sorted(symmetric.pack_symmetric(numbers).tolist()) == sorted(set(numbers.flatten().tolist()))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_round_trip(d: int, dtype: torch.dtype) -> None:
    law_round_trip(d, dtype)


def test_both_ways_give_one_form() -> None:
    """What a checkpoint of a larger limit holds is what one of a smaller limit reads."""
    for d in (1, 2, 5, 8, 33):
        matrix = torch.randn(d, d, generator=torch.Generator().manual_seed(d))
        matrix = matrix + matrix.T
        packed = symmetric._pack_by_blocks(matrix)
        assert torch.equal(symmetric.pack_symmetric(matrix), packed)
        # Only the lower triangle is read, of views and copies alike.
        assert torch.equal(symmetric.pack_symmetric(matrix.tril()), packed)
        wide = torch.nn.functional.pad(matrix, (1, 2))[:, 1 : d + 1]
        assert torch.equal(symmetric.pack_symmetric(wide), packed)
        assert torch.equal(symmetric.unpack_symmetric(packed, d), symmetric._unpack_by_blocks(packed, d))


@pytest.mark.parametrize("size", [14, 16])
def test_a_form_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        symmetric.unpack_symmetric(torch.zeros(size), 5)
    with pytest.raises(RuntimeError):
        symmetric.pack_symmetric(torch.zeros(5, 3))


def test_mutant_upper_for_lower_is_caught() -> None:
    original = symmetric.unpack_symmetric
    for d in (4, 5):
        assert_caught(
            lambda d=d: law_round_trip(d, torch.float64),
            symmetric,
            "unpack_symmetric",
            lambda packed, d: original(packed, d).tril(),
        )
