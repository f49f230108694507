"""A model of your own in dngd's trainer: attention layers of PyG behind a residual input, with K-FAC.

    python examples/custom_model.py

A module gets a GraphBatch: input rows `x`, and one set of edges a layer, whose destinations are the first rows of its
sources. With `forward_layer` it is evaluated exactly, layer by layer; without it, on whole neighbourhoods.
`--engine ray --num-workers 2` trains it on two workers.
"""

import argparse

import torch
import torch.nn.functional as F
from torch_geometric.nn import GATConv

import dngd


class ResidualGAT(torch.nn.Module):
    def __init__(self, shape, hidden=64, heads=4):
        super().__init__()
        self.embed = torch.nn.Linear(shape.num_features, hidden)
        self.convs = torch.nn.ModuleList(GATConv(hidden, hidden // heads, heads) for _ in range(2))
        self.out = torch.nn.Linear(hidden, shape.num_classes)

    def forward(self, batch):
        hidden = batch.x
        for index, edges in enumerate(batch.layers):
            hidden = self.forward_layer(index, hidden, edges)
        return hidden

    def forward_layer(self, index, x, edges):
        """Return layer `index`'s rows, [num_dst, ...], from its source rows [num_src, ...]."""
        if index == 0:
            x = F.relu(self.embed(x))
        own = x[: edges.num_dst]
        hidden = own + F.elu(self.convs[index]((x, own), edges.edge_index))
        hidden = F.dropout(hidden, 0.3, self.training)
        return self.out(hidden) if index + 1 == len(self.convs) else hidden


class Watch(dngd.Callback):
    """Prints the length of the attention vectors, which only the module itself knows."""

    def on_evaluation(self, run, record):
        lengths = [f"{conv.att_src.norm():.2f}" for conv in run.model.convs]
        print(f"step {record.step}  val accuracy {record.val_accuracy:.4f}  attention {', '.join(lengths)}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="products-mini")
    parser.add_argument("--engine", default="local")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()

    config = dngd.TrainConfig(**vars(arguments), num_layers=2, fanout=(10, 10), batch_size=512, lr=0.05)
    trainer = dngd.Trainer(config, module=ResidualGAT, callbacks=[Watch()], quiet=True)
    result = trainer.fit()
    print(f"test accuracy {result.test_accuracy:.4f}, {result.run_dir}")
    model = trainer.best_model()  # a plain torch module
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
