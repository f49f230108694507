"""Predicting with a run's best model: exact, on all neighbours, written to Parquet block by block."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.graph.manifest import are_numbers, dngd_version
from dngd.paths import expanded, printable
from dngd.train.evaluation import EvaluationProgress
from dngd.train.link_predict import pair_batches, pair_fields, read_pairs
from dngd.train.new_file import new_file
from dngd.train.parts import RunParts
from dngd.train.run_folder import check_output
from dngd.train.trained_model import (
    TrainedModel,
    evaluator_of,
    load_trained,
    open_graph,
    split_warning,
    trained_on,
)

NODES = ("all", "train", "val", "test", "unlabelled")


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


_FLOATS = _list_of(pa.float32())

OTHER_TABLES = (".csv", ".tsv", ".feather", ".arrow", ".xlsx")

ROW_GROUP_ROWS = 128 * 1024
ROW_GROUP_BYTES = 64 * 1024 * 1024
"""Of probabilities and embeddings: a row group of wide ones has fewer rows."""


@dataclass(frozen=True)
class Predictions:
    """What was written. path: the file. rows: number of nodes, or pairs. graph: its name. step: of the model."""

    path: str
    rows: int
    nodes: str
    run: str
    step: int
    model: str
    graph: str
    graph_digest: str
    columns: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def predict_run(
    run: Path,
    out: Path,
    *,
    nodes: str = "all",
    pairs: Path | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    dataset: str | None = None,
    probabilities: bool = False,
    overwrite: bool = False,
    progress: EvaluationProgress | None = None,
    parts: RunParts | None = None,
    tell: Callable[[str], None] = warn,
) -> Predictions:
    """Write the classes that a run's best model gives nodes, from all their neighbours, to a Parquet file.

    Columns: node_id, as the user gave it (int64 or string); class, int64, the label as the user gave it where it was a
    number; class_name where the graph that the run was trained on kept names of its labels; probability, float32, of
    that class; with probabilities=True, probabilities, the list of all classes'. Of several labels a node: node_id,
    classes (the list of those with a probability above 1/2), class_names likewise, and, as before, probabilities. Rows
    are in the order of the graph's nodes. The file's metadata (dngd.run, dngd.step, dngd.model, dngd.graph,
    dngd.graph_digest, dngd.nodes, dngd.version) say what made it, and dngd.class_names, in JSON, what the user calls
    the classes of probabilities, in their order; it is not there for classes 0, 1, 2, ...

    Of link prediction, on all edges of the graph: node_id and embedding, a list of float32; with pairs, a table whose
    columns src and dst name nodes: src, dst and probability, float32, of a link.

    run: its folder or address. nodes: all, train, val, test (of the run's split, taken in the graph), or unlabelled.
    data_root: where the run's data set is now. cache_dir: folder of converted stores, if not the run's. dataset:
    another graph with the same features, or where the run's is now. overwrite: replace a file. progress: see
    EvaluationProgress. parts: with the module of a run that had one of its own. tell: hears where a part of the split
    may not be what it seems. The file appears when it is whole; it is written a row group at a time.
    Raises UserError for what `evaluate_run` does, a path that cannot be written, and nodes that the graph has not.
    """
    out = expanded(out)
    _check_out(out, run, pairs, overwrite)
    trained = load_trained(run, parts)
    _check_task(trained, nodes, pairs, probabilities)
    store = open_graph(trained, dataset, data_root, cache_dir)
    fields: list[pa.Field]
    batches: Iterator[pa.RecordBatch]
    is_wide = probabilities
    if pairs is not None:
        ends = read_pairs(pairs, store)
        fields = pair_fields(store)
        schema = pa.schema(fields, _said(trained, store, "pairs"))
        batches = pair_batches(trained, store, *ends, schema, progress)
    else:
        chosen = _chosen(trained, store, nodes)
        warning = split_warning(trained, store) if nodes in ("train", "val", "test") else None
        if warning is not None:
            tell(warning)
        names = _class_names(trained, store, dataset)
        with_names = names is not None and pa.types.is_string(names.type)
        fields = _fields(trained, store, with_names=with_names, probabilities=probabilities)
        said = {} if names is None else {"dngd.class_names": json.dumps(names.to_pylist())}
        schema = pa.schema(fields, _said(trained, store, nodes) | said)
        evaluator = evaluator_of(trained, store, chosen, progress)
        batches = _batches(evaluator.predictions(trained.model, chosen), store, schema, names)
        is_wide |= trained.config.task == "link"
    written = 0
    try:
        # Through a link, which stays.
        with (
            new_file(Path(os.path.realpath(out)), overwrite=overwrite) as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            for group in _groups(batches, _group_rows(trained, is_wide)):
                writer.write_table(group, row_group_size=group.num_rows)
                written += group.num_rows
    except FileExistsError:
        raise UserError(_exists(out)) from None
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}; free space or give another --out"
        ) from None
    return Predictions(
        path=str(out),
        rows=written,
        nodes=nodes if pairs is None else "pairs",
        run=_run_name(trained),
        step=trained.step,
        model=trained.config.model,
        graph=store.name,
        graph_digest=store.digest,
        columns=tuple(schema.names),
    )


def probabilities_of_run(
    run: Path,
    nodes: Tensor | None = None,
    *,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    dataset: str | None = None,
    parts: RunParts | None = None,
) -> Tensor:
    """Return the probabilities that a run's best model gives nodes, from all their neighbours: float32 [n, C]; of link
    prediction the nodes' embeddings.

    nodes: int64 [n], distinct, in any order; None for all. The others as in `predict_run`. Raises UserError for what
    `evaluate_run` does, and for nodes that the graph has not.
    """
    trained = load_trained(run, parts)
    store = open_graph(trained, dataset, data_root, cache_dir)
    if nodes is not None and not _are_nodes(nodes, store.num_nodes):
        raise UserError(
            f"nodes must be distinct int64 numbers of nodes, 0 to {store.num_nodes - 1}, in one dimension; map ids to "
            f"numbers with the store's node_ids"
        )
    evaluator = evaluator_of(trained, store, nodes)
    row_of = torch.full((store.num_nodes,), -1)
    wanted = torch.arange(store.num_nodes) if nodes is None else nodes
    row_of[wanted] = torch.arange(wanted.numel())
    out = torch.empty(wanted.numel(), trained.num_classes)
    for ids, logits in evaluator.predictions(trained.model, nodes):
        if trained.config.task == "link":
            shares = logits.float()
        else:
            shares = logits.float().sigmoid() if trained.is_multilabel else logits.float().softmax(dim=1)
        out[row_of[ids]] = shares.cpu()
    return out


def _are_nodes(nodes: Tensor, num_nodes: int) -> bool:
    if nodes.dim() != 1 or nodes.dtype != torch.int64:
        return False
    inside = bool(((nodes >= 0) & (nodes < num_nodes)).all())
    return inside and int(torch.bincount(nodes, minlength=1).max()) <= 1


def _check_out(out: Path, run: Path, pairs: Path | None, overwrite: bool) -> None:
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the path of a file, such as {out / 'predictions.parquet'}")
    check_output(out, [expanded(run)])
    if pairs is not None and out.exists() and pairs.exists() and out.samefile(pairs):
        raise UserError(f"--out {out} is the table that --pairs names; give another path")
    if out.suffix.lower() in OTHER_TABLES:
        raise UserError(f"--out {out} would hold Parquet; give a name that ends in .parquet")
    if out.exists() and not overwrite:
        raise UserError(_exists(out))
    folder = Path(os.path.realpath(out)).parent if out.is_symlink() else out.parent
    if not folder.is_dir():
        raise UserError(f"--out {out} cannot be written: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {out} cannot be written: no permission to write to {folder}; give another path")


def _exists(out: Path) -> str:
    return f"--out {out} exists; give another path, or --overwrite to replace it"


def _check_task(trained: TrainedModel, nodes: str, pairs: Path | None, probabilities: bool) -> None:
    """Raise UserError for what a run of this task cannot predict."""
    run, is_link = trained.folder.shown, trained.config.task == "link"
    if pairs is not None and not is_link:
        raise UserError(f"run {run} predicts labels of nodes, not links; leave --pairs out")
    if not is_link:
        return
    if nodes != "all":
        raise UserError(
            f"--nodes {nodes} is a part of labelled nodes, but run {run} predicts links; leave it out for all nodes' "
            "embeddings, or give --pairs"
        )
    if probabilities:
        raise UserError(
            f"--probabilities are those of classes, but run {run} predicts links; give --pairs, or leave it out for "
            "all nodes' embeddings"
        )


def _chosen(trained: TrainedModel, store: GraphStore, nodes: str) -> Tensor | None:
    """Return the nodes to predict, ascending; None for all."""
    if nodes not in NODES:
        raise UserError(f"--nodes {nodes!r} is unknown; use one of: " + ", ".join(NODES))
    if nodes == "all":
        return None
    if nodes == "unlabelled":
        found = (~store.labelled).nonzero()[:, 0]
        if found.numel() == 0:
            raise UserError(f"graph {store.name} has no unlabelled nodes; use another --nodes, such as all")
        return found
    part: Tensor = getattr(store.split(trained.config.split, trained.config.seed), nodes)
    return part.sort().values


def _class_names(trained: TrainedModel, store: GraphStore, dataset: str | None) -> pa.Array | None:
    """Return the names of the classes that the model learnt, string [num_classes], or int64 where labels were numbers;
    None where they are not known, and for links."""
    if trained.config.task == "link":
        return None
    names = trained.label_names
    if names is None:
        # A run of before it kept them. Another graph's names may stand in another order.
        is_own = dataset is None or trained_on(trained) == store.digest
        names = store.label_names if is_own else None
    if names is None or len(names) != trained.num_classes:
        return None
    return pa.array(names, pa.int64() if are_numbers(names) else pa.string())


def _run_name(trained: TrainedModel) -> str:
    return trained.folder.path.resolve().name


def _fields(trained: TrainedModel, store: GraphStore, *, with_names: bool, probabilities: bool) -> list[pa.Field]:
    fields = [pa.field("node_id", store.ids_of(0, 1).type, nullable=False)]
    if trained.config.task == "link":
        fields.append(pa.field("embedding", _FLOATS, nullable=False))
    elif trained.is_multilabel:
        fields.append(pa.field("classes", _list_of(pa.int64()), nullable=False))
        if with_names:
            fields.append(pa.field("class_names", _list_of(pa.string()), nullable=False))
    else:
        fields.append(pa.field("class", pa.int64(), nullable=False))
        if with_names:
            fields.append(pa.field("class_name", pa.string(), nullable=False))
        fields.append(pa.field("probability", pa.float32(), nullable=False))
    if probabilities:
        fields.append(pa.field("probabilities", _FLOATS, nullable=False))
    return fields


def _said(trained: TrainedModel, store: GraphStore, nodes: str) -> dict[str, str]:
    said = {
        "run": printable(_run_name(trained)),
        "step": str(trained.step),
        "model": trained.config.model,
        "graph": store.name,
        "graph_digest": store.digest,
        "nodes": nodes,
        "version": dngd_version(),
    }
    return {f"dngd.{key}": value for key, value in said.items()}


def _group_rows(trained: TrainedModel, is_wide: bool) -> int:
    if not is_wide:
        return ROW_GROUP_ROWS
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // (4 * trained.num_classes)))


def _batches(
    blocks: Iterator[tuple[Tensor, Tensor]], store: GraphStore, schema: pa.Schema, names: pa.Array | None
) -> Iterator[pa.RecordBatch]:
    for ids, logits in blocks:
        if ids.numel():
            yield _batch(ids, logits.float().cpu(), store, schema, names)


def _batch(ids: Tensor, logits: Tensor, store: GraphStore, schema: pa.Schema, names: pa.Array | None) -> pa.RecordBatch:
    """Return the rows of nodes ids, ascending, from logits [n, num_classes]."""
    is_multilabel, is_embedding = "classes" in schema.names, "embedding" in schema.names
    shares = logits if is_embedding else logits.sigmoid() if is_multilabel else logits.softmax(dim=1)
    bad = ~shares.isfinite().all(dim=1)
    if bool(bad.any()):
        first = int(ids[bad][0])
        raise UserError(
            f"node {store.ids_of(first, first + 1)[0]} of {store.name} gets no finite prediction; check the graph's "
            "features with dngd data verify, and the run's model with dngd evaluate"
        )
    columns: dict[str, Any] = {"node_id": _ids(store, ids)}
    if is_embedding:
        columns["embedding"] = _lists(logits)
    elif is_multilabel:
        found = logits > 0
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), found.sum(dim=1).cumsum(0)]).to(torch.int32)
        values = pa.array(found.nonzero()[:, 1].numpy())
        columns["classes"] = pa.ListArray.from_arrays(ends.numpy(), values, type=_list_of(pa.int64()))
        if "class_names" in schema.names and names is not None:
            columns["class_names"] = pa.ListArray.from_arrays(
                ends.numpy(), names.take(values), type=_list_of(pa.string())
            )
    else:
        classes = logits.argmax(dim=1)
        places = pa.array(classes.numpy())
        if "class_name" in schema.names and names is not None:
            columns["class_name"] = names.take(places)
        columns["class"] = places
        if names is not None and pa.types.is_integer(names.type):
            columns["class"] = names.take(places)
        columns["probability"] = pa.array(shares.gather(1, classes[:, None])[:, 0].numpy())
    if "probabilities" in schema.names:
        columns["probabilities"] = _lists(shares)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _lists(rows: Tensor) -> pa.ListArray:
    """Return rows [n, C] as n lists."""
    offsets = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)
    return pa.ListArray.from_arrays(offsets.numpy(), rows.contiguous().view(-1).numpy(), type=_FLOATS)


def _ids(store: GraphStore, ids: Tensor) -> Any:
    """Return the users' names of nodes, ascending."""
    first, last = int(ids[0]), int(ids[-1]) + 1
    names = store.ids_of(first, last)
    return names if last - first == ids.numel() else names.take(pa.array((ids - first).numpy()))


def _groups(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Yield tables of `rows` rows, the last one of what is left."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while count + batch.num_rows >= rows:
            taken = rows - count
            yield pa.Table.from_batches([*held, batch.slice(0, taken)])
            batch, held, count = batch.slice(taken), [], 0
        if batch.num_rows:
            held.append(batch)
            count += batch.num_rows
    if held:
        yield pa.Table.from_batches(held)
