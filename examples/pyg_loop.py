"""Your own PyG loop with natural gradients: three lines differ from Adam.

A two-layer GCN of PyG's own layers with BatchNorm, full batch, on the built-in graph. Run:

    python examples/pyg_loop.py            # natural gradient
    python examples/pyg_loop.py --adam     # the same loop with Adam
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.nn import BatchNorm, GCNConv

from dngd.graph import resolve_dataset
from dngd.optim import NaturalGradient, default_damping  # 1


class GCN(torch.nn.Module):
    def __init__(self, num_features, hidden, num_classes):
        super().__init__()
        self.first = GCNConv(num_features, hidden, cached=True)
        self.norm = BatchNorm(hidden)
        self.second = GCNConv(hidden, num_classes, cached=True)

    def forward(self, x, edge_index):
        hidden = F.relu(self.norm(self.first(x, edge_index)))
        return self.second(F.dropout(hidden, training=self.training), edge_index)


def as_pyg(store, split):
    """Return a dngd store as a PyG Data object with the split's masks."""
    targets = torch.repeat_interleave(torch.arange(store.num_nodes), store.indptr.diff())
    data = Data(x=store.features.clone(), edge_index=torch.stack([store.indices, targets]), y=store.labels.clone())
    for name in ("train", "val", "test"):
        data[f"{name}_mask"] = torch.zeros(store.num_nodes, dtype=torch.bool)
        data[f"{name}_mask"][getattr(split, name)] = True
    return data


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="products-mini")
    parser.add_argument("--split", default="masks")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--adam", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    store = resolve_dataset(arguments.dataset)
    data = as_pyg(store, store.split(arguments.split, 0))
    model = GCN(store.num_features, arguments.hidden, store.num_classes)
    num_train = int(data.train_mask.sum())
    if arguments.adam:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    else:
        optimizer = NaturalGradient(
            model, lr=0.2, **default_damping(num_train, store.num_classes, full_batch=True)
        )  # 2

    seconds = 0.0
    for step in range(arguments.steps):
        started = time.perf_counter()
        model.train()
        optimizer.zero_grad()
        out = model(data.x, data.edge_index)
        loss = F.cross_entropy(out[data.train_mask], data.y[data.train_mask])
        loss.backward()
        if arguments.adam:
            optimizer.step()
        else:
            optimizer.step(num_samples=num_train)  # 3
        seconds += time.perf_counter() - started
        if step % 5 == 4:
            model.eval()
            with torch.no_grad():
                right = model(data.x, data.edge_index).argmax(dim=1) == data.y
            accuracy = right[data.val_mask].float().mean()
            print(f"step {step + 1}  loss {loss.item():.4f}  val accuracy {accuracy:.4f}  {seconds:.1f} s")


if __name__ == "__main__":
    main()
