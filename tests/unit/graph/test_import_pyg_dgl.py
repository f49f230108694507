"""Graphs of PyG and DGL, from objects and from files: the same store as of the arrays themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data, HeteroData, InMemoryDataset

from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.graph.dgl_graph import import_dgl
from dngd.graph.pyg import import_pyg
from dngd.sampling import import_dgl as dgl_module
from dngd.sampling.dgl_files import import_dgl_file


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Multi-edges, self loops and isolated nodes come by themselves."""
    num_nodes = draw(st.integers(1, 12))
    node = st.integers(0, num_nodes - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=30))
    seed = draw(st.integers(0, 2**16))
    generator = np.random.RandomState(seed)
    train = generator.rand(num_nodes) < 0.5
    train[0] = True
    return {
        "edge_index": np.array(edges, dtype=np.int64).reshape(-1, 2).T.copy(),
        "features": generator.standard_normal((num_nodes, 3)).astype(np.float32),
        "labels": generator.randint(0, 4, num_nodes),
        "masks": {"train": train, "val": ~train},
        "edge_weight": generator.rand(len(edges)).astype(np.float32) if draw(st.booleans()) else None,
    }


def expected(graph: dict[str, Any], folder: Path) -> GraphStore:
    return GraphStore.write(folder / "expected", **graph, overwrite=True, duplicates="keep", self_loops="keep")


def as_pyg(graph: dict[str, Any]) -> Data:
    data = Data(
        x=torch.from_numpy(graph["features"]),
        edge_index=torch.from_numpy(graph["edge_index"]),
        y=torch.from_numpy(graph["labels"]),
        num_nodes=len(graph["labels"]),
    )
    for name, mask in graph["masks"].items():
        data[f"{name}_mask"] = torch.from_numpy(mask)
    if graph["edge_weight"] is not None:
        data.edge_weight = torch.from_numpy(graph["edge_weight"])
    return data


def as_dgl(graph: dict[str, Any]) -> Any:
    begin, end = torch.from_numpy(graph["edge_index"])
    made = dgl_module().graph((begin, end), num_nodes=len(graph["labels"]))
    made.ndata["feat"] = torch.from_numpy(graph["features"])
    made.ndata["label"] = torch.from_numpy(graph["labels"])
    for name, mask in graph["masks"].items():
        made.ndata[f"{name}_mask"] = torch.from_numpy(mask)
    if graph["edge_weight"] is not None:
        made.edata["weight"] = torch.from_numpy(graph["edge_weight"])
    return made


OPTIONS: dict[str, Any] = {"overwrite": True, "duplicates": "keep", "self_loops": "keep"}
PROPERTY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.filterwarnings("ignore:.*have no node")
@PROPERTY
@given(graph=arrays())
def test_pyg_round_trip(tmp_path: Path, graph: dict[str, Any]) -> None:
    digest = expected(graph, tmp_path).digest
    data = as_pyg(graph)
    assert import_pyg(data, tmp_path / "object", **OPTIONS).digest == digest
    torch.save(data, tmp_path / "data.pt")
    InMemoryDataset.save([data], str(tmp_path / "dataset.pt"))
    for file in ("data.pt", "dataset.pt"):
        store = import_pyg(tmp_path / file, tmp_path / "file", **OPTIONS)
        assert store.digest == digest
        assert store.name == Path(file).stem
        assert store.manifest.provenance.source == file
        assert store.manifest.provenance.source_sha256 is not None


@pytest.mark.filterwarnings("ignore:.*have no node")
@PROPERTY
@given(graph=arrays())
def test_dgl_round_trip(tmp_path: Path, graph: dict[str, Any]) -> None:
    digest = expected(graph, tmp_path).digest
    made = as_dgl(graph)
    assert import_dgl(made, tmp_path / "object", **OPTIONS).digest == digest
    dgl_module().save_graphs(str(tmp_path / "graph.bin"), [made])
    store = import_dgl_file(tmp_path / "graph.bin", tmp_path / "file", OPTIONS)  # type: ignore[arg-type]
    assert store.digest == digest


def test_splits_as_columns_labels_with_gaps_and_ids(tmp_path: Path) -> None:
    data = Data(
        x=torch.arange(4.0),
        edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]]),
        y=torch.tensor([[0.0], [float("nan")], [1.0], [1.0]]),
        train_mask=torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]]).bool(),
        n_id=torch.tensor([7, 2**40, 5, 9]),
    )
    store = import_pyg(data, tmp_path / "store", feature_dtype="bfloat16", add_reverse=True)
    assert store.features.dtype == torch.bfloat16
    assert store.features.float().flatten().tolist() == [0, 1, 2, 3]
    assert store.labels.tolist() == [0, -1, 1, 1]
    assert store.split_masks["train"].tolist() == [[True, False, True, False], [False, False, True, False]]
    assert list(store.node_ids) == [7, 2**40, 5, 9]
    assert store.num_edges == 6
    assert not store.manifest.directed


def test_classes_without_a_node_keep_their_numbers_and_are_told(tmp_path: Path) -> None:
    data = Data(x=torch.ones(3, 1), edge_index=EDGES, y=torch.tensor([3, -1, 1]))
    graph = dgl_module().graph(([0], [1]), num_nodes=3)
    graph.ndata["label"] = data.y
    for made, importer in ((data, import_pyg), (graph, import_dgl)):
        with pytest.warns(UserWarning, match=r"^2 of the 4 classes of the graph.* have no node \(0, 2\); "):
            store = importer(made, tmp_path / "store", overwrite=True)
        assert (store.labels.tolist(), store.num_classes) == ([3, -1, 1], 4)


def test_sparse_features(tmp_path: Path) -> None:
    dense = torch.tensor([[1.0, 0, 2], [0, 0, 0]])
    edges = torch.tensor([[0], [1]])
    for form in (dense.to_sparse(), dense.to_sparse_csr()):
        store = import_pyg(Data(x=form, edge_index=edges), tmp_path / "store", overwrite=True)
        assert torch.equal(store.features, dense)


def test_masks_and_labels_in_other_forms(tmp_path: Path) -> None:
    """As lists, numpy arrays, sparse tensors and bfloat16: the same store."""
    train, labels = torch.tensor([True, False, True]), torch.tensor([1, 0, 2])
    edges = torch.tensor([[0, 1], [1, 2]])
    wanted = import_pyg(Data(edge_index=edges, y=labels, train_mask=train, num_nodes=3), tmp_path / "wanted").digest
    forms: list[dict[str, Any]] = [
        {"train_mask": train.tolist(), "y": labels},
        {"train_mask": train.numpy(), "y": labels},
        {"train_mask": train.numpy()[::-1], "y": labels.to(torch.bfloat16)},
        {"train_mask": [1, 0, 1], "y": labels.to_sparse()},
        {"train_mask": [1.0, 0.0, 1.0], "y": labels.double()},
        {"train_mask": train.to(torch.bfloat16), "y": labels},
        {"train_mask": train.to_sparse(), "y": labels[:, None].to_sparse_csr()},
    ]
    for form in forms:
        for graph in (Data(edge_index=edges, num_nodes=3, **form), {"edge_index": edges, **form}):
            assert import_pyg(graph, tmp_path / "store", overwrite=True).digest == wanted


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "known",
    [
        {"y": torch.tensor([0, 1, 0, 1, 1])},
        {"train_mask": torch.tensor([True, False, True, False, False])},
        {"train_mask": torch.eye(5, 3).bool(), "test_mask": torch.ones(5, 3).bool()},
        {"y": torch.tensor([0, 1, 0, 1, 1]), "train_mask": torch.eye(5, 3).bool().T},
        {"train_mask": torch.eye(5, 3).bool().T.contiguous()},
        {"y": torch.zeros(5, 2), "n_id": torch.arange(5)},
        {"n_id": torch.arange(5) + 7},
        {"num_nodes": 5},
    ],
)
def test_isolated_last_nodes_are_counted_by_what_each_node_has(tmp_path: Path, known: dict[str, Any]) -> None:
    """Without x the edges alone would end at node 3."""
    edges = torch.tensor([[0, 1], [1, 3]])
    torch.save(Data(edge_index=edges, **known), tmp_path / "data.pt")
    InMemoryDataset.save([Data(edge_index=edges, **known)], str(tmp_path / "dataset.pt"))
    for source in (Data(edge_index=edges, **known), tmp_path / "data.pt", tmp_path / "dataset.pt"):
        assert import_pyg(source, tmp_path / "store", overwrite=True).num_nodes == 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"y": torch.zeros(5), "val_mask": torch.ones(6).bool()}, "y 5, val_mask 6 entries and edge_index names"),
        ({"y": torch.zeros(1)}, "y 1 entries and edge_index names node 3"),
        ({"y": torch.zeros(5), "train_mask": torch.ones(6, 2).bool()}, "y 5, train_mask 6 x 2 entries"),
    ],
)
def test_what_does_not_agree_on_the_number_of_nodes(tmp_path: Path, known: dict[str, Any], told: str) -> None:
    data = Data(edge_index=torch.tensor([[0, 1], [1, 3]]), **known)
    with pytest.raises(UserError, match=rf"{told}.*set data\.num_nodes = N"):
        import_pyg(data, tmp_path / "store")


@pytest.mark.filterwarnings("error")
def test_edges_alone_tell_their_nodes(tmp_path: Path) -> None:
    assert import_pyg(Data(edge_index=torch.tensor([[0, 1], [1, 3]])), tmp_path / "store").num_nodes == 4


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_file_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = Data(edge_index=torch.zeros(2, 0, dtype=torch.int64), num_nodes=1)
    data.extra = Bomb()
    torch.save(data, "bad.pt")
    with pytest.raises(UserError, match="could run code"):
        import_pyg("bad.pt", "store")
    assert not Path("exploded").exists()
    assert not Path("store").exists()


EDGES = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (Data(x=torch.ones(2, 1)), "no edge_index"),
        (Data(x=torch.ones(2, 1), edge_index=EDGES + 5), "edge 0 .* joins 5 -> 6"),
        (Data(x=torch.tensor([[1.0], [float("inf")]]), edge_index=EDGES), "node 1 column 0"),
        (Data(x=torch.ones(2, 1), y=torch.eye(2), edge_index=EDGES), "one-hot"),
        (Data(x=torch.ones(2, 1), edge_index=EDGES, train_mask=torch.zeros(2).bool()), "without training nodes"),
        (Data(x=torch.ones(2, 1), edge_index=EDGES, edge_weight=torch.ones(3)), "weight"),
        (HeteroData(), "several types"),
        ([Data(), Data()], "2 graphs"),
        (object(), "not a PyG graph"),
        (["a"], "is a str, not a PyG graph"),
        ([["a"]], "is a list, not a PyG graph"),
        ({1}, "is a set, not a PyG graph"),
        ({"edge_index": torch.zeros(2, 0, dtype=torch.int64)}, "no edges, and nothing that tells its nodes"),
        (Data(x=torch.tensor(1.0), edge_index=EDGES), "x of the graph is a single number"),
        ({"edge_index": EDGES, "num_nodes": "three"}, "num_nodes of the graph is 'three'"),
        ({"edge_index": EDGES, "num_nodes": 2.5}, "num_nodes of the graph is 2.5"),
        (Data(x=torch.ones(2, 1), edge_index=EDGES, train_mask=["yes", "no"]), "train mask .* is a list of <U3"),
        (Data(x=torch.ones(2, 1), edge_index=EDGES, train_mask=[[True], [True, False]]), "not a rectangular array"),
        (Data(x=torch.ones(2, 1), edge_index=EDGES, edge_weight=torch.ones(2).to_sparse()), "weights .* sparse"),
        ({"x": torch.ones(2, 1), "edge_index": EDGES.to_sparse()}, "source nodes .* sparse"),
        ({"x": torch.ones(2, 1), "edge_index": EDGES, "y": torch.tensor([0, 2**40])}, "is beyond 65535"),
        ({"x": torch.ones(2, 1), "edge_index": EDGES, "train_mask": [1.0, 2.0]}, "train mask has 2.0 for node 1"),
    ],
)
def test_bad_pyg_graphs(tmp_path: Path, graph: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        import_pyg(graph, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("width", "fix"), [(1, "give it as edge_weight"), (3, "use no edge features$")])
def test_edge_features_are_said_to_be_left_out(tmp_path: Path, width: int, fix: str) -> None:
    graph = Data(x=torch.ones(2, 1), edge_index=EDGES, edge_attr=torch.ones(2, width))
    with pytest.warns(UserWarning, match=rf"edge_attr of the graph is left out: .*{fix}"):
        import_pyg(graph, tmp_path / "store")


class OwnTypes(HeteroData):
    """A class of one's own."""


@pytest.mark.parametrize("has_edges", [True, False])
def test_several_types_are_refused_however_they_come(tmp_path: Path, has_edges: bool) -> None:
    """As an object, of a class of one's own, in a list, in the two kinds of file, and of DGL in a file."""
    graphs = [HeteroData(), OwnTypes()]
    for graph in graphs:
        graph["author"].x = torch.ones(3, 2)
        graph["paper"].x = torch.ones(2, 4)
        if has_edges:
            graph["author", "writes", "paper"].edge_index = torch.tensor([[0, 1, 2], [0, 1, 1]])
    torch.save(graphs[0], tmp_path / "data.pt")
    InMemoryDataset.save([graphs[0]], str(tmp_path / "dataset.pt"))
    for source in (*graphs, [graphs[0]], tmp_path / "data.pt", tmp_path / "dataset.pt"):
        with pytest.raises(UserError, match=r"has several types of nodes or edges.*data\.to_homogeneous\(\)"):
            import_pyg(source, tmp_path / "store")
    dgl = dgl_module()
    edges = ([0, 1], [1, 0])
    relations = {("a", "r", "a"): edges, ("a", "s", "a"): edges} if has_edges else {("a", "r", "b"): edges}
    dgl.save_graphs(str(tmp_path / "types.bin"), [dgl.heterograph(relations)])
    with pytest.raises(UserError, match=r"has [12] types of nodes and [12] of edges.*dgl\.to_homogeneous"):
        import_dgl_file(tmp_path / "types.bin", tmp_path / "store", {})
    assert not (tmp_path / "store").exists()


def test_bad_files(tmp_path: Path) -> None:
    dgl = dgl_module()
    (tmp_path / "junk.pt").write_bytes(b"junk" * 10)
    (tmp_path / "junk.bin").write_bytes(b"junk" * 10)
    whole = tmp_path / "two.bin"
    graph = dgl.graph(([0, 1], [1, 0]))
    dgl.save_graphs(str(whole), [graph, graph])
    for length in (20, 200):
        (tmp_path / f"cut{length}.bin").write_bytes(whole.read_bytes()[:length])
    with pytest.raises(UserError, match="damaged"):
        import_pyg(tmp_path / "junk.pt", tmp_path / "store")
    for content in (b"src,dst\n1,2\n", b"PAR1" + bytes(40), b"", b"\x80"):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(
            UserError, match=r"other.pt is no \.pt file of PyG, or is damaged \([^)]*\); save it again$"
        ):
            import_pyg(tmp_path / "other.pt", tmp_path / "store")
    with pytest.raises(UserError, match="is not a file"):
        import_pyg(tmp_path / "none.pt", tmp_path / "store")
    for content in ("a", [[["a"]]], ("a", None), ([["a"]], None)):
        torch.save(content, tmp_path / "text.pt")
        with pytest.raises(UserError, match=r"text.pt is a (str|list), not a PyG graph"):
            import_pyg(tmp_path / "text.pt", tmp_path / "store")
    for name, words in (
        ("junk.bin", "begins otherwise"),
        ("cut20.bin", r"cut20.bin cannot be read by DGL \(Check failed: .* Invalid num of graph\); it is damaged"),
        ("cut200.bin", "damaged"),
        ("two.bin", "2 graphs"),
        ("none.bin", "is not a file"),
    ):
        with pytest.raises(UserError, match=words):
            import_dgl_file(tmp_path / name, tmp_path / "store", {})
    hetero = dgl.heterograph({("a", "to", "b"): ([0], [1])})
    with pytest.raises(UserError, match="2 types of nodes"):
        import_dgl(hetero, tmp_path / "store")
    with pytest.raises(UserError, match="give a DGLGraph"):
        import_dgl(graph.adj, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_file_that_knows_its_node_attributes(tmp_path: Path) -> None:
    """Transforms ask data which attributes are a node's; the answer is pickled with it, in a defaultdict."""
    graph = Data(x=torch.ones(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]))
    assert graph.is_node_attr("x")
    torch.save(graph, tmp_path / "asked.pt")
    known = set(torch.serialization.get_safe_globals())
    assert import_pyg(tmp_path / "asked.pt", tmp_path / "store").num_edges == 2
    assert set(torch.serialization.get_safe_globals()) == known
