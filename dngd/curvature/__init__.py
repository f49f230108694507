"""Curvature of one layer as tensors: statistics, factors, Fisher kinds, damping, inverses.

Pure functions and small containers; no collective, no Ray, no DGL. A layer computes `Z = M Wᵀ + b`;
row `m_i` of M is node i's aggregated input with a 1 appended for the bias, and `g_i` is the gradient
of the **sum** of the seeds' losses with respect to row `z_i`. Its Fisher block is approximated by
`F ≈ A ⊗ G` (Martens & Grosse 2015; Izadi et al. 2020, arXiv 2008.09624, for graph convolutions).
"""

from dngd.curvature.damping import DampingMode, damping_split, pi_ratio
from dngd.curvature.fisher import FisherKind, LossKind, hessian_columns, random_signs, sampled_gradient
from dngd.curvature.inverse import InverseResult, cholesky_inverse, eigendecomposition
from dngd.curvature.layout import FactorLayout, output_rank_for
from dngd.curvature.low_rank import LowRank
from dngd.curvature.precondition import (
    inner_product,
    kl_clip_scale,
    norm_scale,
    precondition,
    precondition_in_eigenbasis,
    precondition_with_inverses,
    rotate,
    rotate_back,
    row_scales,
)
from dngd.curvature.reads import entries_are_finite, extremes, read_together, vectors_on_host
from dngd.curvature.statistics import FactorStatistics, KroneckerFactors
from dngd.curvature.structure import BlockDiagonal, Dense, Diagonal, FactorStructure, SparseInput, Tensors, gram
from dngd.curvature.symmetric import pack_symmetric, packed_diagonal, packed_size, unpack_symmetric

__all__ = [
    "BlockDiagonal",
    "DampingMode",
    "Dense",
    "Diagonal",
    "FactorLayout",
    "FactorStatistics",
    "FactorStructure",
    "FisherKind",
    "InverseResult",
    "KroneckerFactors",
    "LossKind",
    "LowRank",
    "SparseInput",
    "Tensors",
    "cholesky_inverse",
    "damping_split",
    "eigendecomposition",
    "entries_are_finite",
    "extremes",
    "gram",
    "hessian_columns",
    "inner_product",
    "kl_clip_scale",
    "norm_scale",
    "output_rank_for",
    "pack_symmetric",
    "packed_diagonal",
    "packed_size",
    "pi_ratio",
    "precondition",
    "precondition_in_eigenbasis",
    "precondition_with_inverses",
    "random_signs",
    "read_together",
    "rotate",
    "rotate_back",
    "row_scales",
    "sampled_gradient",
    "unpack_symmetric",
    "vectors_on_host",
]
