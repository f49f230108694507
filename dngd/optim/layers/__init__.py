"""Adapters: from modules of torch, PyG and DGL to layers that have curvature."""

from dngd.optim.layers.base import CurvatureLayer
from dngd.optim.layers.find import find_layers, unwrapped

__all__ = ["CurvatureLayer", "find_layers", "unwrapped"]
