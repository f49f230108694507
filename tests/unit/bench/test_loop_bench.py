"""`dngd bench loop`: curves are those of each setting's loop alone, and what they say is what is told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dngd
from dngd.bench import LoopOptions, run_loop_bench
from dngd.bench.loop import DEFAULT, FULL, TOLD, Stack
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.optim import NaturalGradient, default_damping
from tests.unit.bench.test_commands import run


def options(store: GraphStore, **changes: object) -> LoopOptions:
    fields = {"hidden": 8, "steps": 6, "rates": (0.01,), "seeds": (0,), "threads": 1, **changes}
    return LoopOptions([(str(store.path), "masks")], **fields)  # type: ignore[arg-type]


def alone(store: GraphStore, kind: str, name: str, steps: int) -> tuple[list[float], list[float]]:
    """Return the validation and test accuracies of one setting's own loop, without turns or a benchmark."""
    split, x, y = store.split("masks", 0), store.features.float(), store.labels.long()
    targets = torch.repeat_interleave(torch.arange(store.num_nodes), store.indptr.diff())
    edge_index = torch.stack([store.indices.long(), targets])
    torch.manual_seed(0)
    model = Stack(kind, [store.num_features, 8, store.num_classes])
    torch.manual_seed(0)
    n, c = len(split.train), store.num_classes
    optimizer: torch.optim.Optimizer
    if name == FULL:
        optimizer = NaturalGradient(model, lr=0.2, **default_damping(n, c, full_batch=True))
    elif name == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    else:
        optimizer = NaturalGradient(model, **(default_damping(n, c) if name == TOLD else {}))
    found: tuple[list[float], list[float]] = ([], [])
    for step in range(steps + 1):
        model.eval()
        with torch.no_grad():
            right = model(x, edge_index).argmax(dim=1) == y
        for values, nodes in zip(found, (split.val, split.test)):
            values.append(float(right[nodes].double().mean()))
        if step == steps:
            break
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x, edge_index)[split.train], y[split.train]).backward()  # type: ignore[no-untyped-call]
        if isinstance(optimizer, NaturalGradient):
            optimizer.step(num_samples=len(split.train))
        else:
            optimizer.step()
    if isinstance(optimizer, NaturalGradient):
        optimizer.preconditioner.close()
    return found


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_a_setting_trains_as_if_it_were_alone(store: GraphStore, kind: str) -> None:
    (panel,) = run_loop_bench(options(store, models=[(kind, 2)]))["panels"]
    assert panel["graph"]["split_sizes"]["val"] > 0
    curves = []
    labels = {"adam": "adam lr=0.01", DEFAULT: f"{DEFAULT} lr=0.1", TOLD: f"{TOLD} lr=0.1", FULL: f"{FULL} lr=0.2"}
    for name, label in labels.items():
        (data,) = panel["settings"][label]["runs"]
        val, test = alone(store, kind, name, 6)
        assert (data["step"], data["val_score"], data["test_score"]) == (list(range(7)), val, test)
        assert all(0 < a < b for a, b in zip(data["seconds"][1:], data["seconds"][2:]))
        curves.append(val)
    assert len({tuple(curve) for curve in curves}) == 4, "the settings cannot be told apart on this graph"


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_a_sampled_setting_trains_as_if_it_were_alone(store: GraphStore, kind: str) -> None:
    """Over the batches of a loader of its own, evaluated on the whole graph."""
    changes = {"models": [(kind, 2)], "num_neighbors": (4, 3), "batch_size": 50}
    (panel,) = run_loop_bench(options(store, **changes))["panels"]
    assert set(panel["settings"]) == {"adam lr=0.01", f"{DEFAULT} lr=0.1", f"{TOLD} lr=0.1"}
    split = store.split("masks", 0)
    targets = torch.repeat_interleave(torch.arange(store.num_nodes), store.indptr.diff())
    whole = store.features.float(), torch.stack([store.indices.long(), targets])
    for name in ("adam", TOLD):
        torch.manual_seed(0)
        model = Stack(kind, [store.num_features, 8, store.num_classes], cached=False)
        torch.manual_seed(0)
        damping = default_damping(len(split.train), store.num_classes)
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer = adam if name == "adam" else NaturalGradient(model, **damping)
        found = []
        with dngd.NeighborLoader(store, (4, 3), split.train, 50) as loader:
            batches = itertools.chain.from_iterable(itertools.repeat(loader))
            for step in range(7):
                model.eval()
                with torch.no_grad():
                    right = model(*whole)[split.val].argmax(dim=1) == store.labels[split.val]
                found.append(float(right.double().mean()))
                if step == 6:
                    break
                model.train()
                optimizer.zero_grad()
                batch = next(batches)
                n = batch.batch_size
                F.cross_entropy(model(batch.x, batch.edge_index)[:n], batch.y[:n]).backward()  # type: ignore[no-untyped-call]
                optimizer.step(num_samples=n) if isinstance(optimizer, NaturalGradient) else optimizer.step()
        label = "adam lr=0.01" if name == "adam" else f"{TOLD} lr=0.1"
        assert panel["settings"][label]["runs"][0]["val_score"] == found, name
        assert len(set(found)) > 2


def test_the_command_writes_what_it_prints(
    store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"loop --datasets {store.path}@masks --hidden 8 --steps 4 --seeds 0,1 --lrs 1e-2,3e-2 --threads 1"
    code, out, err = run([*arguments.split(), "--json", "--out", str(tmp_path / "loop.json")], capsys)
    assert (code, err) == (0, "")
    result = json.loads(out, parse_constant=pytest.fail)
    assert json.loads((tmp_path / "loop.json").read_text()) == result
    assert set(result["summary"]) == {DEFAULT, TOLD, FULL}
    assert len(result["panels"][0]["settings"]["adam lr=0.03"]["runs"]) == 2
    code, out, _ = run(arguments.split(), capsys)
    assert code == 0
    for words in ("mean of 2 seed(s)", f": {TOLD} ", f"{DEFAULT} to target primary"):
        assert words in out


def test_it_is_told_where_adams_best_lies_at_the_border_of_what_was_tried(store: GraphStore) -> None:
    """With rates of next to nothing the highest is the best; with rates far too high the lowest is."""
    for rates, names in (((1e-6, 0.03), ["learning rate"]), ((1e-7, 0.01, 30.0), [])):
        (panel,) = run_loop_bench(options(store, rates=rates, steps=12))["panels"]
        best = max(
            (of for of in panel["settings"].values() if of["group"] == "adam"), key=lambda of: of["best"]["mean"]
        )
        ends = ["steps"] if best["best"]["step"] == 12 else []
        assert best["lr"] in (0.03, 0.01)
        assert best["borders"] == names + ends
        assert len(set(panel["remarks"])) == len(panel["remarks"])
        assert any("its grid's border" in remark for remark in panel["remarks"]) == bool(names + ends)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lrs adam=0.1", "Adam's rates alone"),
        ("--models gat:2", "give gcn or sage"),
        ("--models gcn:0", "at least one layer"),
        ("--steps 0", "steps=0 is below 1"),
        ("--hidden 0", "hidden=0 is below 1"),
        ("--datasets nowhere", "nowhere"),
        ("--threads 0", "threads=0 is below 1"),
        ("--num-neighbors 5", "gcn:2 has another number of layers than --num-neighbors has hops, 1"),
        ("--num-neighbors 5,x", "--num-neighbors '5,x' is not valid"),
        ("--num-neighbors 5,0", "num_neighbors=[5, 0] is not valid"),
        ("--num-neighbors 5,5 --batch-size 0", "batch-size=0 is below 1"),
        ("--batch-size 64", "--batch-size 64 is of sampled batches, and these are full; add --num-neighbors"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    flags: str, words: str, store: GraphStore, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(["loop", "--datasets", f"{store.path}@masks", *flags.split()], capsys)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())


def test_a_loop_needs_seeds(store: GraphStore) -> None:
    with pytest.raises(UserError, match="give --datasets, --lrs, --seeds"):
        run_loop_bench(options(store, seeds=()))


def test_a_graph_without_features_is_refused(tmp_path: Path) -> None:
    labels = np.arange(12) % 3
    masks = {name: np.arange(12) // 4 == part for part, name in enumerate(("train", "val", "test"))}
    edges = np.stack([np.arange(12), labels])
    store = GraphStore.write(
        tmp_path / "bare", features=None, edge_index=edges, num_nodes=12, labels=labels, masks=masks
    )
    with pytest.raises(UserError, match="bare has no features"):
        run_loop_bench(options(store))


def test_a_missing_gpu_is_said_at_once(
    store: GraphStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = run(["loop", "--datasets", f"{store.path}@masks", "--use-gpu"], capsys)
    assert (code, out) == (2, "")
    assert "--use-gpu was given but torch sees no CUDA device here" in err
