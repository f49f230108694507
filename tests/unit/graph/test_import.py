"""Importers: npz and Planetoid, their agreement, and files that must not be trusted."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from dngd.errors import UserError
from dngd.graph import GraphStore, import_npz, import_planetoid


@pytest.fixture
def npz_arrays() -> dict[str, Any]:
    features = scipy.sparse.random(20, 9, density=0.3, format="csr", rng=np.random.default_rng(0))
    ring = np.arange(20)
    forward = np.stack([ring, (ring + 1) % 20])
    return {
        "edge_index": np.concatenate([forward, forward[::-1]], axis=1).astype(np.int32),
        "num_nodes": np.int64(20),
        "x_indptr": features.indptr,
        "x_indices": features.indices.astype(np.uint16),
        "x_data": features.data.astype(np.float32),
        "x_shape": np.array([20, 9]),
        "y": (ring % 3).astype(np.int16),
        "train_mask": ring < 5,
        "has_features": ring < 3,
    }


def save(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_sparse_and_dense_features_give_one_store(npz_arrays: dict[str, Any], tmp_path: Path) -> None:
    sparse = import_npz(save(tmp_path / "s.npz", npz_arrays), tmp_path / "sparse")
    matrix = scipy.sparse.csr_matrix(
        (npz_arrays["x_data"], npz_arrays["x_indices"].astype(np.int32), npz_arrays["x_indptr"]), shape=(20, 9)
    )
    dense_arrays = {k: v for k, v in npz_arrays.items() if not k.startswith("x_")} | {"x": matrix.toarray()}
    dense = import_npz(save(tmp_path / "d.npz", dense_arrays), tmp_path / "dense")
    assert sparse.manifest.files == dense.manifest.files
    assert np.array_equal(sparse.features.numpy(), matrix.toarray())
    assert not sparse.manifest.directed
    assert sparse.manifest.provenance.source == "s.npz"


def test_a_table_of_many_blocks_is_whole(
    npz_arrays: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "g.npz", npz_arrays)
    whole = import_npz(path, tmp_path / "whole")
    monkeypatch.setattr("dngd.graph.canonical._BLOCK_BYTES", 3 * 9 * 4)
    assert import_npz(path, tmp_path / "blocks").manifest.files == whole.manifest.files


def test_labels_and_masks_as_floats(npz_arrays: dict[str, Any], tmp_path: Path) -> None:
    """NaN is no label, and 0.0 and 1.0 are a mask: the store of whole numbers and booleans."""
    labels, train = np.arange(20) % 3, np.arange(20) < 8
    labels[[2, 9]] = -1
    exact = import_npz(save(tmp_path / "g.npz", {**npz_arrays, "y": labels, "train_mask": train}), tmp_path / "exact")
    floats = {"y": np.where(labels < 0, np.nan, labels), "train_mask": train.astype(np.float32)}
    store = import_npz(save(tmp_path / "g.npz", {**npz_arrays, **floats}), tmp_path / "floats")
    assert store.digest == exact.digest
    assert store.labels.tolist() == labels.tolist()


def test_classes_without_a_node_keep_their_numbers_and_are_told(npz_arrays: dict[str, Any], tmp_path: Path) -> None:
    npz_arrays["y"] = npz_arrays["y"] * 4 + 1
    with pytest.warns(UserWarning, match="have no node") as told:
        store = import_npz(save(tmp_path / "gaps.npz", npz_arrays), tmp_path / "store")
    assert (store.num_classes, store.label_names) == (10, None)
    assert store.labels.tolist() == npz_arrays["y"].tolist()
    assert [str(warning.message) for warning in told] == [
        f"7 of the 10 classes of {tmp_path / 'gaps.npz'} have no node (0, 2, 3, 4, 6, …); the model gets an output for "
        "each of them all the same: number the classes from 0 without gaps if they are not meant to be there"
    ]


def test_both_names_of_the_validation_mask(npz_arrays: dict[str, Any], tmp_path: Path) -> None:
    masks = {"train_mask": np.arange(20) < 5, "valid_mask": np.arange(20) > 12}
    arrays = without("val_mask", "test_mask")(npz_arrays) | masks
    store = import_npz(save(tmp_path / "g.npz", arrays), tmp_path / "out")
    assert store.split_masks["val"].tolist() == masks["valid_mask"].tolist()


def without(*keys: str) -> Any:
    return lambda a: {k: v for k, v in a.items() if k not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("edge_index"), "lacks edge_index .it has: num_nodes"),
        (without("edge_index", "num_nodes"), "lacks edge_index and num_nodes"),
        (without("x_data"), "lacks x_data"),
        (lambda a: {**a, "y": np.array([0] * 20, dtype=object)}, "array 'y' .* is pickled"),
        (lambda a: {**a, "num_nodes": np.array([1, 2])}, "one whole number"),
        (lambda a: {**a, "x_indices": a["x_indices"] + 9}, "do not fit together"),
        (lambda a: {**a, "x_indptr": a["x_indptr"][::-1].copy()}, "do not fit together"),
        (lambda a: {**a, "x_shape": np.array([20])}, "do not fit together"),
        (lambda a: {**a, "x_shape": np.array([20, 2**40])}, "have 1099511627776 columns"),
        (lambda a: {**a, "y": np.arange(20) * 2**36}, "label 1305670057984 of node 19 is beyond 65535.*ids, times"),
        (lambda a: {**a, "y": np.where(np.arange(20) == 3, 0.5, np.nan)}, r"label 0.5 of node 3 .*\(1 such"),
        (lambda a: {**a, "y": np.where(np.arange(20) == 3, np.inf, 1)}, r"label inf of node 3 .*\(1 such"),
        (lambda a: {**a, "y": np.array(["red"] * 20)}, "labels have dtype <U3.*class numbers"),
        (lambda a: {**a, "train_mask": np.linspace(0, 1, 20)}, r"mask has 0\.05\d* for node 1 \(18 such.*booleans"),
        (lambda a: {**a, "val_mask": np.append(np.ones(19), np.nan)}, "val mask has nan for node 19"),
        (lambda a: {**a, "train_mask": np.array(["yes"] * 20)}, "train mask has dtype <U3.*booleans"),
        (lambda a: {**a, "y": np.full(20, 1e30)}, r"label 1000\d+.* is beyond 65535"),
        (lambda a: {**a, "num_nodes": np.int64(21)}, "20 rows but the graph has 21"),
        (lambda a: {**a, "y": np.eye(4, dtype=np.uint8)[np.arange(20) % 4]}, "one-hot"),
    ],
)
def test_bad_npz(npz_arrays: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    path = save(tmp_path / "g.npz", change(npz_arrays))
    with pytest.raises(UserError, match=message):
        import_npz(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["g.npz"]


def test_damaged_npz_never_raises_anything_else(npz_arrays: dict[str, Any], tmp_path: Path) -> None:
    data = save(tmp_path / "g.npz", npz_arrays).read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(60):
        broken = bytearray(data)
        if trial % 2:
            broken = broken[: int(rng.integers(len(data)))]
        else:
            for position in rng.integers(len(data), size=4):
                broken[position] ^= int(rng.integers(1, 256))
        path = tmp_path / "broken.npz"
        path.write_bytes(bytes(broken))
        try:
            import_npz(path, tmp_path / "out", overwrite=True)
        except UserError:
            continue
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated or damaged"):
        import_npz(path, tmp_path / "out", overwrite=True)


def test_other_files_named_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(UserError, match="single array"):
        import_npz(tmp_path / "one.npz", tmp_path / "out")
    (tmp_path / "two.npz").write_bytes(pickle.dumps({"edge_index": 1}))
    with pytest.raises(UserError, match="no npz file"):
        import_npz(tmp_path / "two.npz", tmp_path / "out")
    with pytest.raises(UserError, match="not a file"):
        import_npz(tmp_path / "none.npz", tmp_path / "out")


def planetoid_folder(folder: Path, **replace: Any) -> Path:
    """Write a tiny graph as Planetoid files: 8 nodes, tests 5 and 7 (7 first), node 6 in no file."""
    rng = np.random.default_rng(0)
    dense = rng.random((7, 4)).astype(np.float32)
    one_hot = np.eye(3, dtype=np.int32)[[0, 1, 2, 0, 1, 2, 2]]
    graph = collections.defaultdict(list, {v: [(v + 1) % 8, (v - 1) % 8, v] for v in range(8)})
    graph[6] = []
    graph[5], graph[7] = [4], [0]
    parts = {
        "x": scipy.sparse.csr_matrix(dense[:2]),
        "tx": scipy.sparse.csr_matrix(dense[5:]),
        "allx": scipy.sparse.csr_matrix(dense[:5]),
        "y": one_hot[:2],
        "ty": one_hot[5:],
        "ally": one_hot[:5],
        "graph": graph,
        **replace,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in parts.items():
        (folder / f"ind.tiny.{name}").write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, 2))
    (folder / "ind.tiny.test.index").write_text("7\n5\n")
    return folder


def test_planetoid_places_test_nodes_and_fills_unlisted_ones(tmp_path: Path) -> None:
    folder = planetoid_folder(tmp_path / "Tiny" / "raw")
    store = import_planetoid(tmp_path / "Tiny", tmp_path / "out")
    dense = np.random.default_rng(0).random((7, 4)).astype(np.float32)
    expected = np.concatenate([dense[:5], dense[6:7], np.zeros((1, 4), np.float32), dense[5:6]])
    assert np.array_equal(store.features.numpy(), expected)
    assert store.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 2]
    masks = {name: mask.nonzero()[:, 0].tolist() for name, mask in store.split_masks.items()}
    assert masks == {"train": [0, 1], "val": [2, 3, 4, 5, 6, 7], "test": [5, 7]}
    assert store.name == "tiny"
    assert import_planetoid(folder, tmp_path / "two").manifest == store.manifest


class Exploit:
    """Runs code when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("part", ["x", "tx", "allx", "y", "ally", "graph"])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, part: str) -> None:
    trace = tmp_path / "trace"
    planetoid_folder(tmp_path / "raw", **{part: pickle.dumps({0: [Exploit(trace)]}, 2)})
    if part == "x":
        # x repeats rows of allx, and is not even read.
        import_planetoid(tmp_path / "raw", tmp_path / "out")
    else:
        with pytest.raises(UserError, match=rf"ind\.tiny\.{part} calls for .*, which no Planetoid file needs"):
            import_planetoid(tmp_path / "raw", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not trace.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch TRACE'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"ccollections\ndefaultdict\n(cos\nsystem\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cf2py.os.getc\x93.",
    ],
)
def test_forbidden_names_are_named(tmp_path: Path, code: bytes) -> None:
    planetoid_folder(tmp_path / "raw", graph=code)
    with pytest.raises(UserError, match="calls for"):
        import_planetoid(tmp_path / "raw", tmp_path / "out")


def test_damaged_planetoid_files_are_named(tmp_path: Path) -> None:
    good = (planetoid_folder(tmp_path / "raw") / "ind.tiny.allx").read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(60):
        broken = bytearray(good)
        for position in rng.integers(len(good), size=3):
            broken[position] ^= int(rng.integers(1, 256))
        planetoid_folder(tmp_path / "raw", allx=bytes(broken[: len(good) if trial % 2 else len(good) // 2]))
        try:
            import_planetoid(tmp_path / "raw", tmp_path / "out", overwrite=True)
        except UserError:
            continue
    (tmp_path / "raw" / "ind.tiny.ty").unlink()
    with pytest.raises(UserError, match=r"lacks ind\.tiny\.ty"):
        import_planetoid(tmp_path / "raw", tmp_path / "out2")
    with pytest.raises(UserError, match="holds no Planetoid files"):
        import_planetoid(tmp_path / "out", tmp_path / "out2")


@pytest.mark.data
@pytest.mark.parametrize("name", ["Cora", "CiteSeer", "PubMed"])
def test_planetoid_originals_equal_the_npz(data_root: Path, tmp_path: Path, name: str) -> None:
    original = import_planetoid(data_root / "planetoid" / name, tmp_path / "original")
    compact = import_npz(data_root / f"{name.lower()}.npz", tmp_path / "compact")
    assert original.manifest.files == compact.manifest.files
    assert original.num_classes == compact.num_classes
    assert original.verify() == []
    split = original.split("public")
    assert (len(split.val), len(split.test)) == (500, 1000)


@pytest.mark.data
def test_graphs_without_masks_labels_or_validation(data_root: Path, tmp_path: Path) -> None:
    structure: GraphStore = import_npz(data_root / "web_notredame.npz", tmp_path / "w")
    assert (structure.num_features, structure.num_classes, structure.num_edges) == (0, 0, 2_180_216)
    with pytest.raises(UserError, match="no labelled node"):
        structure.split("random:0.5/0.25/0.25")
    tolokers = import_npz(data_root / "tolokers.npz", tmp_path / "t")
    assert not tolokers.split("masks:9").train.equal(tolokers.split("masks:0").train)
