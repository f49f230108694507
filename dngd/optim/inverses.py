"""Inverses as they are kept and sent: in half precision with a scale, or in full; or eigenbases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dngd.curvature import FactorStructure, Tensors, pack_symmetric, packed_size, unpack_symmetric

InversePrecision = Literal["float16", "bfloat16", "full"]
PRECISIONS: dict[str, torch.dtype | None] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "full": None}

FactorWire = Literal["float32", "bfloat16"]
WIRES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}

MAX_ROUNDING = 0.06
"""Relative error of an inverse's smallest eigenvalue that half precision may bring."""

Inverses = Mapping[str, tuple[Tensors, Tensors]]
"""Each layer's damped inverses (of A, of G), in the precision that is computed with."""

TensorSpec = tuple[tuple[int, ...], bool, torch.dtype]
"""(shape, symmetric, dtype)."""


@dataclass(frozen=True)
class Wanted:
    """What a refresh makes of a factor.

    eigenbasis: decompose it (EKFAC, Adam in the eigenbasis) instead of inverting it. dtype: precision in which
    symmetric inverses are kept and sent; each carries a scale, so that half precision's range is no limit.
    None: as computed. It is used where rounding leaves the inverse sound (`rounds`).
    """

    eigenbasis: bool
    dtype: torch.dtype | None

    def rounds(self, trace: float, damping: float) -> bool:
        """Return whether `(M + λI)⁻¹` may be kept in `dtype`: where `u·(1 + tr M / λ) <= 0.06`, u its unit roundoff.

        Entries are rounded relative to the largest, 1/λ at most, while the smallest eigenvalue of the inverse is at
        least `1 / (tr M + λ)`: the bound keeps every direction's relative error of that order. λ = tr M / 100 passes
        in float16; bfloat16 wants λ above tr M / 14.
        """
        if self.dtype is None or not damping > 0:
            return False
        return torch.finfo(self.dtype).eps / 2 * (1.0 + trace / damping) <= MAX_ROUNDING

    def tensors(self, structure: FactorStructure, computed: torch.dtype) -> list[TensorSpec]:
        """Return (shape, symmetric, dtype) of each tensor of a stored inverse."""
        if self.eigenbasis:
            return [(shape, False, computed) for shape in structure.eigenbasis_shapes()]
        return [
            (shape, symmetric, self.dtype if symmetric and self.dtype is not None else computed)
            for shape, symmetric in structure.inverse_shapes()
        ]

    def kept_bytes(self, structure: FactorStructure, computed: torch.dtype) -> int:
        """Return the bytes in which an inverse is kept."""
        return sum(math.prod(shape) * dtype.itemsize for shape, _, dtype in self.tensors(structure, computed))

    def wire_bytes(self, structure: FactorStructure, computed: torch.dtype) -> int:
        """Return the bytes of an inverse on the wire: triangles of symmetric tensors, and a scale each."""
        total = 0
        for shape, symmetric, dtype in self.tensors(structure, computed):
            entries = packed_size(shape[0]) if symmetric else math.prod(shape)
            total += entries * dtype.itemsize + 8
        return total


@dataclass
class StoredInverse:
    """An inverse or eigenbasis in its structure's tensors; `scales[i] * tensors[i]` is the value."""

    tensors: Tensors
    scales: tuple[float, ...]

    def is_exact(self, computed: torch.dtype) -> bool:
        """Return whether every tensor is kept as computed."""
        return all(tensor.dtype == computed for tensor in self.tensors)

    def expanded(self, dtype: torch.dtype) -> Tensors:
        """Return the tensors in a precision to compute with."""
        return tuple(
            tensor if tensor.dtype == dtype and scale == 1.0 else tensor.to(dtype).mul_(scale)
            for tensor, scale in zip(self.tensors, self.scales)
        )


HELD_ELSEWHERE = StoredInverse((), ())
"""What stands for an inverse that exists, on another rank alone."""


@dataclass(frozen=True)
class Decomposition:
    """The outcome of one inversion or eigendecomposition, and how long it took; see dngd.curvature.InverseResult."""

    stored: StoredInverse | None
    escalations: int
    seconds: float = 0.0


def decompose(structure: FactorStructure, averages: Tensors, damping: float, wanted: Wanted) -> Decomposition:
    """Invert `M + λI`, or decompose M, and store it as wanted. A damping that is not positive fails."""
    if wanted.eigenbasis:
        basis = structure.eigenbasis(averages)
        return Decomposition(None if basis is None else StoredInverse(basis, (1.0,) * len(basis)), 0)
    if not (math.isfinite(damping) and damping > 0):
        return Decomposition(None, 0)
    result = structure.invert(averages, damping)
    if result.inverse is None:
        return Decomposition(None, result.escalations)
    return Decomposition(_store(structure, result.inverse, wanted), result.escalations)


def _store(structure: FactorStructure, inverse: Tensors, wanted: Wanted) -> StoredInverse:
    tensors, scales = [], []
    for tensor, (_, _, dtype) in zip(inverse, wanted.tensors(structure, inverse[0].dtype)):
        scale = 1.0
        if dtype != tensor.dtype:
            scale = float(tensor.abs().amax()) or 1.0
            tensor = (tensor / scale).to(dtype)
        tensors.append(tensor)
        scales.append(scale)
    return StoredInverse(tuple(tensors), tuple(scales))


def to_bytes(structure: FactorStructure, inverse: StoredInverse, wanted: Wanted) -> Tensor:
    """Return an inverse as bytes, triangles packed; `from_bytes` gives it back bit by bit."""
    parts = []
    specs = wanted.tensors(structure, inverse.tensors[0].dtype)
    for tensor, scale, (_, symmetric, _) in zip(inverse.tensors, inverse.scales, specs):
        body = pack_symmetric(tensor) if symmetric else tensor.contiguous().view(-1)
        scale_tensor = torch.tensor([scale], dtype=torch.float64, device=tensor.device)
        parts += [scale_tensor.view(torch.uint8), body.view(torch.uint8)]
    return torch.cat(parts)


def from_bytes(structure: FactorStructure, buffer: Tensor, wanted: Wanted, computed: torch.dtype) -> StoredInverse:
    """Return the inverse that `to_bytes` packed."""
    tensors, scales = [], []
    offset = 0
    for shape, symmetric, dtype in wanted.tensors(structure, computed):
        # Views of other types want aligned storage; a slice of the buffer need not be.
        scales.append(float(buffer[offset : offset + 8].clone().view(torch.float64)))
        offset += 8
        entries = packed_size(shape[0]) if symmetric else math.prod(shape)
        size = entries * dtype.itemsize
        flat = buffer[offset : offset + size].clone().view(dtype)
        offset += size
        tensors.append(unpack_symmetric(flat, shape[0]) if symmetric else flat.view(shape))
    return StoredInverse(tuple(tensors), tuple(scales))
