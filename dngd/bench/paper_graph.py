"""A graph of the paper's table, ready for full-batch training: every node a seed, the first aggregation done."""

from __future__ import annotations

from dataclasses import dataclass

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.bench.paper_recipes import Features, Recipe
from dngd.bench.paper_sparse import ConstantMatrix
from dngd.graph import GraphStore, Split
from dngd.models import GNN, Propagation, build_model
from dngd.train.batch import PropagationBuilder
from dngd.train.full_batch import FullBatches

_ROWS_AT_A_TIME = 65536
_MOST_LAYERS = 3


@dataclass(frozen=True)
class PaperGraph:
    """Rows of all tensors: the training nodes (num_train of them, sorted), then all others.

    first: the first layer's rows M = Â·X, [N, F]; product: the same, to multiply with. operator: Â, [N, N].
    labels: int64 [N]. val, test: rows of these nodes.
    """

    store: GraphStore
    num_train: int
    first: Tensor
    product: ConstantMatrix
    operator: ConstantMatrix
    labels: Tensor
    val: Tensor
    test: Tensor

    @classmethod
    def make(cls, store: GraphStore, split: Split, features: Features) -> PaperGraph:
        """Return a store's graph with a split and features; see Recipe."""
        table = store.features.float()
        if features == "row":
            table = table / table.sum(dim=1, keepdim=True).clamp_min(1.0)
        elif features == "l2":
            table = F.normalize(table, dim=1)
        model = build_model("gcn", in_features=table.shape[1], hidden=1, out_features=1, num_layers=2, dropout=0.0)
        builder = PropagationBuilder(store, model.aggregation, table.device)
        batch = FullBatches(
            store,
            builder,
            model,
            table,
            split.train,
            with_unlabelled=True,
            shards=[0],
            num_shards=1,
            rows=_ROWS_AT_A_TIME,
        ).batch(0, 0, 0)
        assert isinstance(batch.first_aggregation, Tensor)
        operator = _matrix(batch.propagations[0])
        row_of = torch.empty_like(batch.seeds)
        row_of[batch.seeds] = torch.arange(batch.seeds.numel())
        labels = store.labels[batch.seeds]
        return cls(
            store,
            split.train.numel(),
            batch.first_aggregation,
            ConstantMatrix(operator, table[batch.seeds]),
            ConstantMatrix(operator),
            labels,
            row_of[split.val],
            row_of[split.test],
        )

    def model(self, recipe: Recipe) -> GNN:
        """Return a recipe's GCN, with weights from torch's current random stream."""
        model = build_model(
            "gcn",
            in_features=self.first.shape[1],
            hidden=recipe.hidden,
            out_features=self.store.num_classes,
            num_layers=recipe.num_layers,
            dropout=recipe.dropout,
        )
        self.product.enter(model.graph_layers()[0].linear)
        return model

    def logits(self, model: GNN, first_output: Tensor) -> Tensor:
        """Return all nodes' logits, [N, C], from the first layer's output [N, hidden]."""
        hidden = first_output
        for layer in model.graph_layers()[1:]:
            hidden = layer.linear(self.operator.times(model.between(hidden)))
        return hidden


def _matrix(propagation: Propagation) -> scipy.sparse.csr_matrix:
    """Return Â of nodes that are their own sources in this order."""
    assert propagation.edge_coefficients is not None
    assert propagation.self_coefficients is not None
    assert propagation.destinations is None
    edges = (propagation.edge_coefficients.numpy(), propagation.indices.numpy(), propagation.indptr.numpy())
    size = (propagation.num_dst, propagation.num_dst)
    return scipy.sparse.csr_matrix(edges, shape=size) + scipy.sparse.diags(propagation.self_coefficients.numpy())
