"""Your own loop over sampled mini-batches of PyG, with natural gradients: dngd.NeighborLoader draws them.

A two-layer GraphSAGE of PyG on the built-in graph; the loader takes a PyG Data object in the same way. Run:

    python examples/neighbor_loader.py            # natural gradient
    python examples/neighbor_loader.py --adam     # the same loop with Adam
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch_geometric.nn import GraphSAGE

import dngd
from dngd.graph import resolve_dataset
from dngd.optim import NaturalGradient, default_damping


@torch.no_grad()
def accuracy(model, loader):
    model.eval()
    right = total = 0
    for batch in loader:
        out = model(batch.x, batch.edge_index)[: batch.batch_size]
        right += int((out.argmax(dim=1) == batch.y[: batch.batch_size]).sum())
        total += batch.batch_size
    return right / total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="products-mini")
    parser.add_argument("--split", default="masks")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--adam", action="store_true", help="at its usual rate, 0.01")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    graph = resolve_dataset(arguments.dataset)
    split = graph.split(arguments.split, 0)
    model = GraphSAGE(graph.num_features, 64, num_layers=2, out_channels=graph.num_classes, dropout=0.5)
    if arguments.adam:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    else:
        optimizer = NaturalGradient(model, **default_damping(len(split.train), graph.num_classes))

    train = dngd.NeighborLoader(graph, [10, 10], split.train, arguments.batch_size)
    val = dngd.NeighborLoader(graph, [10, 10], split.val, arguments.batch_size, shuffle=False)
    seconds = 0.0
    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        model.train()
        for batch in train:
            optimizer.zero_grad()
            out = model(batch.x, batch.edge_index)[: batch.batch_size]
            loss = F.cross_entropy(out, batch.y[: batch.batch_size])
            loss.backward()
            if arguments.adam:
                optimizer.step()
            else:
                optimizer.step(num_samples=batch.batch_size)
        seconds += time.perf_counter() - started
        print(f"epoch {epoch + 1}  loss {loss.item():.4f}  val accuracy {accuracy(model, val):.4f}  {seconds:.1f} s")


if __name__ == "__main__":
    main()
