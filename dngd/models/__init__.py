"""Graph neural networks as small modules over layer graphs."""

from dngd.models.gnn import GNN, MODELS, build_model
from dngd.models.graph_batch import GraphBatch, GraphShape, LayerEdges, LayerwiseModule
from dngd.models.layers import GCNLayer, GraphLayer, SAGELayer
from dngd.models.message_passing import (
    Aggregation,
    Propagation,
    gcn_coefficients,
    inverse_sqrt_degrees,
    mean_coefficients,
)
from dngd.models.pyg_model import PyGModel
from dngd.models.pyg_stack import PyGStack
from dngd.models.sparse_rows import RowsLinear, SparseRows

__all__ = [
    "Aggregation",
    "GCNLayer",
    "GNN",
    "GraphBatch",
    "GraphLayer",
    "GraphShape",
    "LayerEdges",
    "LayerwiseModule",
    "MODELS",
    "Propagation",
    "PyGModel",
    "PyGStack",
    "RowsLinear",
    "SAGELayer",
    "SparseRows",
    "build_model",
    "gcn_coefficients",
    "inverse_sqrt_degrees",
    "mean_coefficients",
]
