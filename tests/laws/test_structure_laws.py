"""Factor structures against dense float64 references: what their sums mean, and what their inverses do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dngd.curvature import (
    BlockDiagonal,
    Dense,
    Diagonal,
    FactorLayout,
    FactorStructure,
    LowRank,
    eigendecomposition,
    output_rank_for,
    structure,
)
from dngd.curvature.structure import probe_vector
from dngd.errors import UserError
from tests.helpers.mutants import assert_caught, mutant

F64 = torch.float64
CPU = torch.device("cpu")


def make_rows(seed: int, count: int, d: int, rank: int, log_condition: float) -> Tensor:
    """[count, d] rows of at most the given rank, whose directions' scales span 10^log_condition."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, min(rank, d))
    scales = torch.logspace(0, -log_condition, rank, dtype=F64)
    mixed = torch.randn(count, rank, generator=generator, dtype=F64) * scales
    return mixed @ torch.randn(rank, d, generator=generator, dtype=F64)


def with_ones(rows: Tensor, ones: bool) -> Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1) if ones else rows


def structures(d: int, rank: int) -> list[FactorStructure]:
    sizes = tuple(size for size in (d // 3, d - d // 3 - 1, 1) if size > 0)
    return [Dense(d), Diagonal(d), BlockDiagonal(sizes), LowRank(d, min(rank, d))]


def mask_of(kind: FactorStructure) -> Tensor:
    """1 where an entry of M is kept."""
    d = kind.dimension
    if isinstance(kind, Diagonal):
        return torch.eye(d, dtype=F64)
    if isinstance(kind, BlockDiagonal):
        owner = torch.cat([torch.full((size,), i) for i, size in enumerate(kind.sizes)])
        return (owner[:, None] == owner).double()
    return torch.ones(d, d, dtype=F64)


def sums_of(kind: FactorStructure, parts: list[tuple[Tensor, float]], ones: bool) -> tuple[Tensor, ...]:
    out = kind.zeros(parts[0][0].dtype, CPU)
    for rows, weight in parts:
        kind.accumulate_(out, rows, ones=ones, weight=weight)
    return out


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Within a tolerance relative to the largest entry."""
    return bool(
        (found.double() - expected.double()).abs().max() <= tolerance * max(float(expected.abs().max()), 1e-300)
    )


cases = given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    d_in=st.integers(1, 11),
    rank=st.integers(1, 11),
    ones=st.booleans(),
    log_condition=st.floats(0, 6),
)


def law_sums_are_linear(seed: int, count: int, d_in: int, rank: int, ones: bool, log_condition: float) -> None:
    """Sums of two parts add up to the whole's; `weight` and decay are plain factors."""
    rows = make_rows(seed, count, d_in, rank, log_condition)
    half = count // 2
    for kind in structures(d_in + ones, rank):
        whole = sums_of(kind, [(rows, 1.0)], ones)
        halves = sums_of(kind, [(rows[:half], 1.0), (rows[half:], 1.0)], ones)
        weighted = sums_of(kind, [(rows[:half], 2.5), (rows, 0.5)], ones)
        first = sums_of(kind, [(rows[:half], 1.0)], ones)
        assert [t.shape for t in whole] == [t.shape for t in kind.zeros(F64, CPU)]
        for a, b, c, d in zip(whole, halves, weighted, first):
            assert close(b, a, 1e-12)
            assert close(c, 2.5 * d + 0.5 * a, 1e-12)


def law_dense_is_the_definition(seed: int, count: int, d_in: int, rank: int, ones: bool, log_condition: float) -> None:
    """`dense` is Σ m mᵀ under the structure's mask; diagonal and operator are dense's own."""
    rows = make_rows(seed, count, d_in, rank, log_condition)
    m = with_ones(rows, ones)
    vector = torch.randn(d_in + ones, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for kind in structures(d_in + ones, rank):
        sums = sums_of(kind, [(rows, 3.0)], ones)
        dense = kind.dense(sums)
        if not isinstance(kind, LowRank):
            assert close(dense, 3.0 * (m.T @ m) * mask_of(kind), 1e-12)
        assert torch.equal(dense, dense.T) or close(dense, dense.T, 1e-15)
        assert close(kind.diagonal(sums), 3.0 * m.square().sum(dim=0), 1e-12)
        assert close(dense.diagonal(), kind.diagonal(sums), 1e-7)
        assert close(kind.operator(sums)(vector), dense @ vector, 1e-12)
        # Of M itself under the mask, and of a low rank's M without its being cut off.
        fixed = probe_vector(d_in + ones, sums[0])
        if isinstance(kind, LowRank):
            fixed = kind.test_matrix(F64, CPU) @ probe_vector(kind.rank, sums[0])
        assert close(kind.probe(sums), 3.0 * (m.T @ m) * mask_of(kind) @ fixed, 1e-10)


def law_low_rank(seed: int, count: int, d_in: int, rank: int, ones: bool, log_condition: float) -> None:
    """F Fᵀ is never above M, and M itself if its rank is at most k; the diagonal is always M's.

    The pseudo-inverse of the core amplifies rounding to √ε at most: directions below ε are cut off.
    """
    rows = make_rows(seed, count, d_in, rank, log_condition)
    m = with_ones(rows, ones)
    exact = m.T @ m
    d = d_in + ones
    norm = float(torch.linalg.matrix_norm(exact, 2))
    for k in range(1, d + 1):
        kind = LowRank(d, k)
        sums = sums_of(kind, [(rows, 1.0)], ones)
        low, rest = kind._parts(sums, F64)
        assert low.shape == (d, k)
        assert float(rest.min()) >= 0
        assert float(torch.linalg.eigvalsh(exact - low @ low.T).min()) >= -1e-6 * norm
        assert close(kind.dense(sums).diagonal(), exact.diagonal(), 1e-6)
        if k >= min(rank, d_in, count) + ones:
            assert close(kind.dense(sums), exact, 1e-6)


def law_inverse_is_the_damped_solve(
    seed: int,
    count: int,
    d_in: int,
    rank: int,
    ones: bool,
    log_condition: float,
    log_damping: float,
    dtype: torch.dtype,
) -> None:
    """`multiply(V, invert(M, λ))` is `V (M + λI)⁻¹`, up to ε times the condition number."""
    rows = make_rows(seed, count, d_in, rank, log_condition).to(dtype)
    d = d_in + ones
    matrix = torch.randn(3, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for kind in structures(d, rank):
        sums = tuple(t / count for t in sums_of(kind, [(rows, 1.0)], ones))
        damping = 10.0**log_damping * float(kind.diagonal(sums).sum()) + 1e-30
        result = kind.invert(sums, damping)
        assert result.inverse is not None
        assert [tuple(t.shape) for t in result.inverse] == [shape for shape, _ in kind.inverse_shapes()]
        for tensor, (_, symmetric) in zip(result.inverse, kind.inverse_shapes()):
            assert tensor.dtype == dtype
            assert not symmetric or torch.equal(tensor, tensor.T)
        assert result.damping == damping
        damped = kind.dense(sums).double() + damping * torch.eye(d, dtype=F64)
        expected = torch.linalg.solve(damped, matrix, left=False)
        found = kind.multiply(matrix.to(dtype), result.inverse).double()
        eigenvalues = torch.linalg.eigvalsh(damped)
        # Woodbury's difference cancels at the scale of 1/λ, whatever the smallest eigenvalue of M is.
        smallest = damping if isinstance(kind, LowRank) else float(eigenvalues[0])
        limit = 40 * d * torch.finfo(dtype).eps * float(eigenvalues[-1]) / smallest**2 * float(matrix.norm())
        assert float((found - expected).norm()) <= limit
        from_left = kind.multiply_from_left(matrix.to(dtype).T, result.inverse).double()
        assert float((from_left - expected.T).norm()) <= limit


@settings(max_examples=30, deadline=None)
@cases
def test_sums_are_linear(seed: int, count: int, d_in: int, rank: int, ones: bool, log_condition: float) -> None:
    law_sums_are_linear(seed, count, d_in, rank, ones, log_condition)


@settings(max_examples=30, deadline=None)
@cases
def test_dense_is_the_definition(seed: int, count: int, d_in: int, rank: int, ones: bool, log_condition: float) -> None:
    law_dense_is_the_definition(seed, count, d_in, rank, ones, log_condition)


@settings(max_examples=30, deadline=None)
@cases
def test_low_rank(seed: int, count: int, d_in: int, rank: int, ones: bool, log_condition: float) -> None:
    law_low_rank(seed, count, d_in, rank, ones, log_condition)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 11),
    st.integers(1, 11),
    st.booleans(),
    st.floats(0, 6),
    st.sampled_from([(torch.float64, -9), (torch.float64, -2), (torch.float32, -3.5), (torch.float32, 0)]),
)
@example(0, 12, 11, 11, True, 6.0, (torch.float64, -9))
@example(0, 12, 11, 11, True, 6.0, (torch.float32, -3.5))
def test_inverse_is_the_damped_solve(
    seed: int, count: int, d_in: int, rank: int, ones: bool, log_condition: float, kind: tuple[torch.dtype, float]
) -> None:
    law_inverse_is_the_damped_solve(seed, count, d_in, rank, ones, log_condition, kind[1], kind[0])


ARGUMENTS: dict[str, Any] = {"seed": 1, "count": 9, "d_in": 7, "rank": 7, "ones": True, "log_condition": 1.0}


def test_mutants_of_the_sums_are_caught() -> None:
    original_gram = structure.gram

    def gram_without_diagonal(rows: Tensor, ones: bool) -> Tensor:
        return (
            original_gram(with_ones(rows * 0 if ones else rows, ones), False)
            + original_gram(with_ones(rows, ones), False) / 2
        )

    assert_caught(lambda: law_dense_is_the_definition(**ARGUMENTS), structure, "gram", gram_without_diagonal)

    def unweighted(self: Diagonal, sums: Any, rows: Tensor, *, ones: bool = False, weight: float = 1.0) -> None:
        sums[0].add_(with_ones(rows, ones).square().sum(dim=0))

    assert_caught(lambda: law_sums_are_linear(**ARGUMENTS), Diagonal, "accumulate_", unweighted)
    assert_caught(lambda: law_dense_is_the_definition(**ARGUMENTS), Diagonal, "accumulate_", unweighted)

    def another_sketch(self: LowRank, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(self.dimension, self.rank, dtype=dtype)

    assert_caught(lambda: law_low_rank(**ARGUMENTS), LowRank, "test_matrix", another_sketch)
    assert_caught(lambda: law_sums_are_linear(**ARGUMENTS), LowRank, "test_matrix", another_sketch)

    def overshooting(self: LowRank, sums: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        low, rest = original_parts(self, sums, dtype)
        return low * 1.01, rest

    original_parts = LowRank._parts
    assert_caught(lambda: law_low_rank(**ARGUMENTS), LowRank, "_parts", overshooting)


def test_mutants_of_the_inverses_are_caught() -> None:
    def law() -> None:
        law_inverse_is_the_damped_solve(**ARGUMENTS, log_damping=-2, dtype=F64)

    for kind in (Dense, Diagonal, BlockDiagonal, LowRank):
        original = kind.invert
        assert_caught(
            law, kind, "invert", lambda self, sums, damping, original=original: original(self, sums, damping * 2)
        )

    def without_correction(self: LowRank, matrix: Tensor, inverse: Any) -> Tensor:
        return matrix * inverse[0]

    assert_caught(law, LowRank, "multiply", without_correction)

    def without_last_block(self: BlockDiagonal, matrix: Tensor, inverse: Any) -> Tensor:
        *parts, last = torch.split(matrix, list(self.sizes), dim=0)
        return torch.cat([*(block @ part for part, block in zip(parts, inverse)), last], dim=0)

    def diagonal_alone(self: LowRank, matrix: Tensor, inverse: Any) -> Tensor:
        return inverse[0][:, None] * matrix

    assert_caught(law, BlockDiagonal, "multiply_from_left", without_last_block)
    assert_caught(law, LowRank, "multiply_from_left", diagonal_alone)


def test_eigenbases() -> None:
    """M = Q diag(e) Qᵀ of the structure's own dense; the diagonal alone where no dense basis is kept."""
    rows = make_rows(3, 20, 8, 8, 2.0)
    for kind in structures(9, 4):
        sums = sums_of(kind, [(rows, 1.0)], True)
        basis = kind.eigenbasis(sums)
        assert basis is not None
        assert [tuple(t.shape) for t in basis] == kind.eigenbasis_shapes()
        if len(basis) == 2:
            q, values = basis
            assert close(q @ q.T, torch.eye(9, dtype=F64), 1e-12)
            assert close((q * values) @ q.T, kind.dense(sums), 1e-12)
        else:
            assert close(basis[0], with_ones(rows, True).square().sum(dim=0), 1e-12)
    assert eigendecomposition(torch.full((2, 2), torch.inf)) is None


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_no_inverse_of_what_is_not_finite(poison: float) -> None:
    for kind in structures(6, 3):
        sums = sums_of(kind, [(make_rows(0, 9, 6, 6, 0.0), 1.0)], False)
        sums[-1].view(-1)[0] = poison
        assert kind.invert(sums, 1.0).inverse is None, kind
        assert kind.eigenbasis(sums) is None, kind


def test_layout_chooses_by_width() -> None:
    layout = FactorLayout(max_dimension=10, rank=4)
    assert layout.input_structure(10) == Dense(10)
    assert layout.input_structure(11) == LowRank(11, 4)
    assert layout.output_structure(10) == Dense(10)
    assert layout.output_structure(21) == BlockDiagonal((7, 7, 7))
    blocks = FactorLayout(max_dimension=10, wide="block_diagonal")
    assert blocks.input_structure(25) == BlockDiagonal((8, 8, 9))
    assert blocks.input_structure(10) == Dense(10)
    dense = FactorLayout(max_dimension=10, wide="dense")
    assert dense.input_structure(500) == Dense(500)
    assert dense.output_structure(500) == Dense(500)
    by_width = FactorLayout(max_dimension=None, rank=None)
    assert by_width.input_structure(400) == Dense(400)
    assert by_width.input_structure(401) == LowRank(401, 64)
    assert by_width.input_structure(801, (400, 401)) == LowRank(801, 64)
    assert by_width.output_structure(640) == Dense(640)
    assert by_width.output_structure(641) == BlockDiagonal((320, 321))
    # Only where low rank takes its place is an A of this width not dense.
    assert replace(by_width, rank=500).input_structure(450) == Dense(450)
    assert replace(by_width, wide="block_diagonal").input_structure(640) == Dense(640)
    assert by_width.for_eigenbases().input_structure(640) == Dense(640)
    assert by_width.for_eigenbases().input_structure(641) == Diagonal(641)
    assert by_width.input_structure(641) == LowRank(641, 64)
    assert by_width.input_structure(4096) == LowRank(4096, 64)
    assert by_width.input_structure(4097) == LowRank(4097, 128)


def test_layout_takes_low_rank_for_outputs_that_are_wide_enough() -> None:
    layout = FactorLayout(max_dimension=500, output_rank=5)
    assert layout.output_structure(19) == Dense(19)
    assert layout.output_structure(20) == LowRank(20, 5)
    assert layout.output_structure(501) == LowRank(501, 5)
    assert layout.input_structure(20) == Dense(20)
    assert layout.for_eigenbases().output_structure(20) == Dense(20)


@pytest.mark.parametrize(
    ("share", "columns"), [(1.0, 16), (1 / 16, 16), (0.0624, 32), (0.5 / 8, 16), (0.05, 32), (0.01, 112), (1e3, 16)]
)
def test_columns_of_low_rank_outputs(share: float, columns: int) -> None:
    assert output_rank_for(share) == columns


@pytest.mark.parametrize("share", [0.0, -0.1, float("nan")])
def test_no_columns_without_damping(share: float) -> None:
    with pytest.raises(UserError, match=f"share={share} is out of range"):
        output_rank_for(share)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.5 / 10, 0.5 / 7, 0.5 / 3, 0.5 / 2])
def test_columns_for_a_damping_leave_no_direction_above_it(share: float, decay: float) -> None:
    """Against the dense inverse, on gradients of flat and steep spectra: what low rank leaves out of M is below
    λ = s · tr M in all directions, and the inverse, 1/λ at most, is off by a smaller part of 1/λ than that is of λ."""
    width = 96
    eye = torch.eye(width, dtype=F64)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.arange(1, width + 1, dtype=F64) ** -decay
        mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=F64))[0]
        rows = torch.randn(300, width, generator=generator, dtype=F64) * scales @ mixing.T
        kind = LowRank(width, output_rank_for(share))
        sums = kind.zeros(F64, CPU)
        kind.accumulate_(sums, rows)
        matrix = rows.T @ rows
        damping = share * float(matrix.trace())
        found = kind.invert(sums, damping).inverse
        assert found is not None
        difference = kind.multiply(eye, found) - torch.linalg.inv(matrix + damping * eye)
        error = float(torch.linalg.matrix_norm(difference, 2)) * damping
        left = float(torch.linalg.matrix_norm(matrix - kind.dense(sums), 2)) / damping
        assert error <= left < 1


@pytest.mark.parametrize("share", [0.5 / 10, 0.5 / 7])
def test_half_as_many_columns_can_leave_a_direction_above_the_damping(share: float) -> None:
    width = 96
    left = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.arange(1, width + 1, dtype=F64) ** -0.5
        mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=F64))[0]
        rows = torch.randn(300, width, generator=generator, dtype=F64) * scales @ mixing.T
        kind = LowRank(width, output_rank_for(share) // 2)
        sums = kind.zeros(F64, CPU)
        kind.accumulate_(sums, rows)
        matrix = rows.T @ rows
        left.append(float(torch.linalg.matrix_norm(matrix - kind.dense(sums), 2)) / (share * float(matrix.trace())))
    assert max(left) > 1


def test_layout_keeps_the_parts_of_a_layer() -> None:
    layout = FactorLayout(max_dimension=10, wide="block_diagonal")
    assert layout.input_structure(9, (4, 5)) == BlockDiagonal((4, 5))
    assert layout.input_structure(17, (4, 13)) == BlockDiagonal((4, 6, 7))
    assert FactorLayout(split_inputs=False).input_structure(9, (4, 5)) == Dense(9)
    assert FactorLayout(max_dimension=10, wide="dense").input_structure(17, (4, 13)) == BlockDiagonal((4, 13))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["low_rank", "block_diagonal"]))
def test_no_block_is_wider_than_asked(dimension: int, limit: int, rank: int, wide: str) -> None:
    layout = FactorLayout(max_dimension=limit, wide=wide, rank=rank)
    for kind in (layout.input_structure(dimension), layout.output_structure(dimension)):
        assert kind.dimension == dimension
        if isinstance(kind, BlockDiagonal):
            assert max(kind.sizes) <= limit
            assert max(kind.sizes) - min(kind.sizes) <= 1
            assert len(kind.sizes) == -(-dimension // limit)
        elif isinstance(kind, LowRank):
            assert (wide, kind.rank) == ("low_rank", rank)
            assert dimension > max(limit, rank)
        else:
            assert dimension <= limit


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"wide": "lowrank"}, "block_diagonal"), ({"max_dimension": 0}, "max_dimension=0"), ({"rank": 0}, "rank=0")],
)
def test_layout_out_of_range(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FactorLayout(**fields)


def law_weak_damping(share: float) -> None:
    """In float32: the inverse of what is kept, M with an exact rank below k, to 1e-4 of its largest entry."""
    d, k = 300, 64
    rows = make_rows(0, 400, d, 40, 3.0).float()
    kind = LowRank(d, k)
    sums = tuple(t / len(rows) for t in sums_of(kind, [(rows, 1.0)], False))
    lam = share * float(sums[1].sum())
    inverse = kind.invert(sums, lam).inverse
    assert inverse is not None
    found = kind.multiply(torch.eye(d), inverse)
    low, rest = kind._parts(sums, F64)
    expected = torch.linalg.inv(low @ low.T + torch.diag(rest + lam))
    assert close(found, expected, 1e-4)


@pytest.mark.parametrize("share", [1e-8, 1e-6, 9e-5, 1.1e-4, 1e-2])
def test_weak_damping(share: float) -> None:
    law_weak_damping(share)
    kind = LowRank(300, 64)
    sums = sums_of(kind, [(make_rows(0, 400, 300, 40, 3.0).float(), 1.0)], False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inverse = kind.invert(sums, share * float(sums[1].sum())).inverse
    plain = kind.invert(sums, share * float(sums[1].sum())).inverse
    assert inverse is not None
    assert plain is not None
    assert all(torch.equal(a, b) for a, b in zip(inverse, plain))


def test_single_precision_under_weak_damping_is_caught() -> None:
    assert_caught(lambda: law_weak_damping(1e-6), LowRank, "_bears_float32", lambda *_: True)


def law_fewer_columns_in_the_inverse(r: int, share: float) -> None:
    """The inverse of F_r F_rᵀ + D_r, F_r the r largest singular directions of F, D_r what they leave."""
    d, k = 60, 20
    rows = make_rows(0, 100, d, 40, 3.0)
    whole, kind = LowRank(d, k), LowRank(d, k, r)
    sums = tuple(t / len(rows) for t in sums_of(kind, [(rows, 1.0)], False))
    lam = share * float(sums[1].sum())
    inverse = kind.invert(sums, lam).inverse
    assert inverse is not None
    assert [tuple(part.shape) for part in inverse] == [shape for shape, _ in kind.inverse_shapes()] == [(d,), (d, r)]
    low, _ = whole._parts(sums, F64)
    left, values, _ = torch.linalg.svd(low, full_matrices=False)
    kept = left[:, :r] * values[:r]
    expected = torch.linalg.inv(kept @ kept.T + torch.diag(sums[1] - kept.square().sum(1) + lam))
    assert close(kind.multiply(torch.eye(d, dtype=F64), inverse), expected, 1e-8)
    assert close(kind.multiply_from_left(torch.eye(d, dtype=F64), inverse), expected, 1e-8)
    full = whole.invert(sums, lam).inverse
    assert full is not None
    assert not close(whole.multiply(torch.eye(d, dtype=F64), full), expected, 1e-8)


@pytest.mark.parametrize("share", [1e-3, 1e-1])
@pytest.mark.parametrize("r", [1, 8, 19])
def test_fewer_columns_in_the_inverse(r: int, share: float) -> None:
    law_fewer_columns_in_the_inverse(r, share)


def test_other_columns_than_the_largest_are_caught() -> None:
    plain = torch.linalg.eigh

    def smallest_first(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = plain(matrix)
        return values, vectors.flip(1)

    # The core's own decomposition does not mind: its values and vectors are flipped alike where it matters.
    def law() -> None:
        law_fewer_columns_in_the_inverse(8, 1e-3)

    parts = LowRank._parts

    def untouched(self: LowRank, sums: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with mutant(torch.linalg, "eigh", plain):
            return parts(self, sums, dtype)

    law()
    with mutant(LowRank, "_parts", untouched):
        law()
        assert_caught(law, torch.linalg, "eigh", smallest_first)


@pytest.mark.parametrize("columns", [20, 21, None])
def test_as_many_columns_as_the_sketch_has(columns: int | None) -> None:
    rows = make_rows(0, 100, 60, 40, 3.0)
    sums = sums_of(LowRank(60, 20), [(rows, 1.0)], False)
    found, expected = (LowRank(60, 20, c).invert(sums, 1.0).inverse for c in (columns, None))
    assert found is not None
    assert expected is not None
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_which_factors_get_fewer_columns_in_the_inverse() -> None:
    layout = FactorLayout(None, "low_rank", None, output_rank=16, inverse_rank=32)
    assert layout.input_structure(4096) == LowRank(4096, 64)
    assert layout.input_structure(4097) == LowRank(4097, 128, 32)
    assert layout.output_structure(5000) == LowRank(5000, 16)
    assert FactorLayout(rank=32, inverse_rank=32).input_structure(5000) == LowRank(5000, 32)
    assert FactorLayout(rank=None).input_structure(5000) == LowRank(5000, 128)
    assert LowRank(4097, 128, 32).label == "rank 128 (32 in the inverse) of 4097"
    with pytest.raises(UserError, match="inverse_rank=0"):
        FactorLayout(inverse_rank=0)
