"""A trained dngd model as a plain PyG module. This file stands alone: dngd export copies it beside the weights.

    from model import load
    model = load()                                   # weights of model.safetensors, in evaluation mode
    logits = model(x, edge_index)                    # all nodes' logits, [N, num_classes]

It needs torch, torch_geometric and safetensors, and gives the predictions that dngd's exact evaluation gives.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, GraphConv


class PlainGNN(nn.Module):
    """`h ← relu(conv(h))` for every convolution but the last, whose output are the logits.

    kind: "gcn" (GCNConv, Kipf & Welling 2017) or "sage" (mean of the neighbours and the node itself, as GraphConv over
    averaging weights). widths: of the features, the hidden layers and the logits. dropout: after each ReLU, in
    training.
    """

    def __init__(self, kind: str, widths: list[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        pairs = list(zip(widths, widths[1:]))
        if kind == "gcn":
            convs = [GCNConv(a, b, normalize=False, add_self_loops=False) for a, b in pairs]
        else:
            convs = [GraphConv(a, b, aggr="add") for a, b in pairs]
        self.convs = nn.ModuleList(convs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Return the logits, [N, C].

        x: [N, F]. edge_index: int64 [2, E], sources in row 0, without the self loops that GCN adds. edge_weight: [E].
        """
        edge_index, coefficients = self.coefficients(edge_index, edge_weight, x.shape[0])
        for index, conv in enumerate(self.convs):
            x = conv(x, edge_index, coefficients.to(x.dtype))
            if index + 1 < len(self.convs):
                x = self.dropout(x.relu())
        return x

    def coefficients(self, edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int) -> tuple[Tensor, Tensor]:
        """Return the edges and what each is weighted with.

        gcn: `w_uv (d_u d_v)^(-1/2)`, d = 1 + summed weights of the in-edges, and self loops of weight `1/d_v`.
        sage: `w_uv / Σ_u w_uv`.
        """
        source, destination = edge_index
        weight = torch.ones(source.numel(), device=source.device) if edge_weight is None else edge_weight.float()
        totals = torch.zeros(num_nodes, device=source.device).index_add_(0, destination, weight)
        if self.kind != "gcn":
            return edge_index, weight / torch.where(totals == 0, 1.0, totals)[destination]
        norm = (totals + 1.0).rsqrt()
        own = torch.arange(num_nodes, device=source.device)
        edges = torch.cat([edge_index, own.expand(2, -1)], dim=1)
        return edges, torch.cat([weight * norm[source] * norm[destination], norm.square()])


def load(folder: str | Path | None = None) -> PlainGNN:
    """Return the model with its weights, in evaluation mode. folder: of model.safetensors; None: this file's."""
    path = (Path(__file__).parent if folder is None else Path(folder)) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    model = PlainGNN(said["kind"], json.loads(said["widths"]), float(said["dropout"]))
    model.load_state_dict(load_file(path))
    return model.eval()
