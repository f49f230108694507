"""Graph neural networks as small modules over layer graphs."""

from dngd.models.gnn import GNN, MODELS, build_model
from dngd.models.layers import GCNLayer, GraphLayer, SAGELayer
from dngd.models.message_passing import (
    Aggregation,
    Propagation,
    gcn_coefficients,
    inverse_sqrt_degrees,
    mean_coefficients,
)

__all__ = [
    "Aggregation",
    "GCNLayer",
    "GNN",
    "GraphLayer",
    "MODELS",
    "Propagation",
    "SAGELayer",
    "build_model",
    "gcn_coefficients",
    "inverse_sqrt_degrees",
    "mean_coefficients",
]
