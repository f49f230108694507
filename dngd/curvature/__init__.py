"""Curvature of one layer as tensors: statistics, factors, damping, inverses.

Pure functions and small containers; no collective, no Ray, no DGL. A layer computes `Z = M Wᵀ + b`;
row `m_i` of M is node i's aggregated input with a 1 appended for the bias, and `g_i` is the gradient
of the **sum** of the seeds' losses with respect to row `z_i`. Its Fisher block is approximated by
`F ≈ A ⊗ G` (Martens & Grosse 2015; Izadi et al. 2020, arXiv 2008.09624, for graph convolutions).
"""

from dngd.curvature.damping import DampingMode, damping_split, pi_ratio
from dngd.curvature.inverse import InverseResult, damped_inverse
from dngd.curvature.precondition import kl_clip_scale, precondition, precondition_with_inverses
from dngd.curvature.statistics import FactorStatistics, KroneckerFactors, input_gram, output_gram

__all__ = [
    "DampingMode",
    "FactorStatistics",
    "InverseResult",
    "KroneckerFactors",
    "damped_inverse",
    "damping_split",
    "input_gram",
    "kl_clip_scale",
    "output_gram",
    "pi_ratio",
    "precondition",
    "precondition_with_inverses",
]
