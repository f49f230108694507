"""Exported models: the same predictions, without dngd."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import dngd
from dngd import cli
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import build_model
from dngd.train.checkpoint import weights_file
from dngd.train.export import to_pyg
from tests.end_to_end.test_local_runs import config
from tests.helpers.exact_evaluation import dense_forward

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import load
given = torch.load(sys.argv[2], weights_only=True)
model = load()
assert not any(name.split(".")[0] == "dngd" for name in sys.modules), "dngd was imported"
with torch.no_grad():
    torch.save(model(given["x"], given["edge_index"]), sys.argv[3])
"""


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A directed graph with weights, self loops, and nodes without edges."""
    generator = torch.Generator().manual_seed(1)
    edges = torch.randint(0, 50, (2, 200), generator=generator)
    return GraphStore.write(
        tmp_path_factory.mktemp("weighted") / "graph",
        edge_index=torch.cat([edges, torch.arange(5).expand(2, -1)], dim=1).unique(dim=1),
        edge_weight=torch.rand(int(torch.cat([edges, torch.arange(5).expand(2, -1)], dim=1).unique(dim=1).shape[1])),
        features=torch.randn(60, 7, generator=generator),
        labels=torch.arange(60) % 3,
        self_loops="keep",
    )


def edges_of(store: GraphStore) -> torch.Tensor:
    destinations = torch.repeat_interleave(torch.arange(store.num_nodes), store.indptr.diff())
    return torch.stack([store.indices, destinations])


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_the_plain_module_gives_the_same_logits(weighted: GraphStore, kind: str) -> None:
    model = build_model(kind, in_features=7, hidden=9, out_features=3, num_layers=3, dropout=0.5).eval()
    for layer in model.graph_layers():
        nn.init.normal_(layer.linear.bias)
    plain = to_pyg(model)
    with torch.no_grad():
        found = plain(weighted.features, edges_of(weighted), weighted.edge_weight)
    assert torch.allclose(found, dense_forward(weighted, model).float(), atol=1e-4)


def test_an_exported_run_predicts_alike_without_dngd(store: GraphStore, tmp_path: Path) -> None:
    made = dngd.Trainer(config(store, tmp_path / "run", model="sage", epochs=1), quiet=True)
    made.fit()
    cli_arguments = ["export", str(tmp_path / "run"), "--format", "pyg", "--out", str(tmp_path / "plain")]
    with pytest.raises(SystemExit) as exit_:
        cli.main(cli_arguments)
    assert exit_.value.code == 0
    torch.save({"x": store.features.clone(), "edge_index": edges_of(store)}, tmp_path / "graph.pt")
    arguments = [str(tmp_path / name) for name in ("plain", "graph.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd=tmp_path, env={"PATH": ""}, timeout=60)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.allclose(logits.softmax(dim=1), made.predict(), atol=1e-5)


def test_weights_in_safetensors(store: GraphStore, tmp_path: Path) -> None:
    made = dngd.Trainer(config(store, tmp_path / "run", epochs=1), quiet=True)
    made.fit()
    path = made.export(tmp_path / "sub" / "weights.safetensors")
    weights = safetensors.torch.load_file(path)
    best = made.best_model().state_dict()
    assert weights.keys() == best.keys()
    assert all(torch.equal(weights[name], best[name]) for name in best)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    assert (said["model"], said["num_features"], said["num_classes"], said["dngd.run"]) == ("gcn", "16", "5", "run")
    assert json.loads(said["hidden"]) == 24
    with pytest.raises(UserError, match="exists; give another path, or --overwrite"):
        made.export(path)
    made.export(path, overwrite=True)
    for bad, message in (
        ({"format": "onnx"}, "use one of: safetensors, pyg"),
        ({"format": "pyg", "overwrite": True}, "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            made.export(path, **bad)


def test_a_module_of_ones_own(store: GraphStore, tmp_path: Path) -> None:
    def module(shape: dngd.GraphShape) -> nn.Module:
        from torch_geometric.nn import SAGEConv

        return dngd.PyGStack([SAGEConv(shape.num_features, 8), SAGEConv(8, shape.num_classes)])

    made = dngd.Trainer(config(store, tmp_path / "run", epochs=1), module=module, quiet=True)
    made.fit()
    assert "convs.0.lin_l.weight" in safetensors.torch.load_file(made.export(tmp_path / "weights"))
    with pytest.raises(UserError, match=r"best_model\(\)"):
        made.export(tmp_path / "plain", format="pyg")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("size", range(8))
def test_a_file_of_weights_has_one_form(tmp_path: Path, size: int) -> None:
    """The same bytes at every call, whatever the header's length; and what is in them comes back."""
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.int64), "c": torch.zeros(())}
    said = {key: 'ö"x' * size for key in ("step", "val", "labels", "width", "depth", "kind")}
    files = {weights_file(tensors, dict(sorted(said.items(), reverse=n % 2 > 0))) for n in range(10)}
    assert len(files) == 1
    path = tmp_path / "weights.safetensors"
    path.write_bytes(files.pop())
    with safe_open(path, "pt") as file:
        assert file.metadata() == said
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: tensor.tolist() for name, tensor in tensors.items()
        }
    assert safetensors.torch.load(path.read_bytes())["a"].dtype == torch.int64
