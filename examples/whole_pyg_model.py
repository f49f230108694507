"""A model of PyG in dngd's trainer as it is, with K-FAC; what comes back is a model of PyG again.

    python examples/whole_pyg_model.py
    python examples/whole_pyg_model.py --stack     # the same layers as a PyGStack, whose steps are shorter

It may be one of PyG's (GCN, GraphSAGE, GAT, ...) or a class of your own over (x, edge_index); num_layers is the number
of its graph layers. `help(dngd.PyGModel)` says what it sees of a mini-batch.
"""

import argparse

import torch
from torch_geometric.nn import GraphSAGE, SAGEConv

import dngd


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="products-mini")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--stack", action="store_true")
    arguments = parser.parse_args()

    def whole(shape):
        return GraphSAGE(shape.num_features, 64, num_layers=2, out_channels=shape.num_classes, dropout=0.5)

    def stack(shape):
        return dngd.PyGStack([SAGEConv(shape.num_features, 64), SAGEConv(64, shape.num_classes)], dropout=0.5)

    config = dngd.TrainConfig(
        dataset=arguments.dataset,
        epochs=arguments.epochs,
        engine="local",
        num_layers=2,
        fanout=(10, 10),
        batch_size=512,
    )
    trainer = dngd.Trainer(config, module=stack if arguments.stack else whole, quiet=True)
    result = trainer.fit()
    print(f"test accuracy {result.test_accuracy:.4f}, a step {result.step_ms['p50']:.0f} ms, {result.run_dir}")
    if arguments.stack:
        return

    model = trainer.best_model()  # a GraphSAGE, on a graph of any size
    x, edge_index = torch.randn(3, model.in_channels), torch.tensor([[0, 1, 2], [1, 2, 0]])
    print(f"{type(model).__name__} on another graph: {list(model(x, edge_index).shape)}")


if __name__ == "__main__":
    main()
