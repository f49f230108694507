"""Your own torch loop with natural gradients: three lines differ from Adam.

A two-layer network on propagated features (SGC, Wu et al. 2019) of the built-in graph, full batch. Run:

    python examples/plain_torch.py            # natural gradient
    python examples/plain_torch.py --adam     # the same loop with Adam
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from dngd.graph import resolve_dataset
from dngd.optim import NaturalGradient  # 1


def propagated_features(store, hops=2):
    """Return D⁻¹(A + I) applied `hops` times to the features, [N, F]."""
    degrees = store.in_degrees()[:, None] + 1
    x = store.features
    for _ in range(hops):
        neighbours = F.embedding_bag(store.indices, x, store.indptr, mode="sum", include_last_offset=True)
        x = (neighbours + x) / degrees
    return x


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="products-mini")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--adam", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    store = resolve_dataset(arguments.dataset)
    split = store.split("masks")
    x, y = propagated_features(store), store.labels
    model = nn.Sequential(nn.Linear(store.num_features, 256), nn.ReLU(), nn.Linear(256, store.num_classes))
    if arguments.adam:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    else:
        optimizer = NaturalGradient(model, lr=0.1)  # 2

    for step in range(arguments.steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[split.train]), y[split.train])
        loss.backward()
        if arguments.adam:
            optimizer.step()
        else:
            optimizer.step(num_samples=len(split.train))  # 3
        if step % 10 == 9:
            with torch.no_grad():
                accuracy = (model(x[split.val]).argmax(dim=1) == y[split.val]).float().mean()
            print(f"step {step + 1}  loss {loss.item():.4f}  val accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
