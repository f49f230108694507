"""Numbers read together are the tensors' own, and what is not finite is found wherever it stands."""

from __future__ import annotations

import pytest
import torch

from dngd.curvature import entries_are_finite, extremes, read_together, vectors_on_host


def test_finite_entries_of_any_size() -> None:
    """Sums of squares overflow where the entries do not."""
    large = torch.full((4,), 3e38)
    assert entries_are_finite([])
    assert entries_are_finite([large, torch.zeros(2, 2), torch.ones(3, dtype=torch.float64)])
    assert entries_are_finite([torch.zeros(0, 3)])


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_entry_that_is_not_finite_is_found(wrong: float, dtype: torch.dtype, size: int) -> None:
    for place in {0, size // 2, size - 1}:
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        tensor[place] = wrong
        assert not entries_are_finite([torch.zeros(2), tensor])
        assert not entries_are_finite([tensor.view(-1, 1), torch.zeros(2)])


def test_least_and_largest() -> None:
    found = extremes([torch.tensor([[2.0, -5.0], [1.0, 0.0]]), torch.zeros(0), torch.tensor([4.0])])
    assert read_together(found) == [-5.0, 2.0, 4.0, 4.0]


def test_numbers_are_the_tensors_own() -> None:
    third = torch.tensor(1.0) / 3
    assert read_together([]) == []
    assert read_together([third, 2 * third]) == [float(third), float(2 * third)]
    doubles = [third, torch.tensor(1.0, dtype=torch.float64) / 3]
    assert read_together(doubles) == [float(third), 1 / 3]


def test_vectors_keep_length_and_type() -> None:
    third = torch.tensor([1.0, 2.0]) / 3
    found = vectors_on_host([third, torch.zeros(0), third.double() / 7, torch.tensor([5.0])])
    assert [vector.dtype for vector in found] == [torch.float32, torch.float32, torch.float64, torch.float32]
    assert torch.equal(found[0], third)
    assert torch.equal(found[2], third.double() / 7)
    assert [vector.numel() for vector in found] == [2, 0, 2, 1]
    assert vectors_on_host([]) == []
