"""A run's best model for use without dngd: its weights in safetensors, or a plain PyG module with them."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from dngd.errors import UserError
from dngd.graph.manifest import dngd_version
from dngd.models import GNN, pyg_export
from dngd.paths import expanded, printable
from dngd.train.checkpoint import host_copies, replace_file, weights_file
from dngd.train.parts import RunParts
from dngd.train.run_folder import check_output
from dngd.train.trained_model import TrainedModel, load_trained

ExportFormat = Literal["safetensors", "pyg"]
PYG_FILES = ("model.py", "model.safetensors")


def export_run(
    run: Path, out: Path, *, format: str = "safetensors", overwrite: bool = False, parts: RunParts | None = None
) -> Path:
    """Write a run's best model to `out` and return it.

    format: safetensors, one file with the module's state_dict and, as metadata, what made it; or pyg, a folder of
        model.py, a plain PyG module that needs no dngd (`from model import load; load()(x, edge_index)`), and its
        weights. overwrite: replace what is there. parts: with the module of a run that had one of its own.
    Raises UserError for a run without a model, for pyg of a module of one's own, or a path that is taken or cannot be
    written.
    """
    if format not in get_args(ExportFormat):
        raise UserError(f"--format {format!r} is unknown; use one of: " + ", ".join(get_args(ExportFormat)))
    out = expanded(out)
    _check_out(out, run, format, overwrite)
    trained = load_trained(run, parts)
    final = Path(os.path.realpath(out))  # through a link, which stays
    try:
        if format == "safetensors":
            final.parent.mkdir(parents=True, exist_ok=True)
            replace_file(final, _file_of(trained))
        else:
            _write_pyg(trained, final)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}; give another path") from None
    return out


def _check_out(out: Path, run: Path, format: str, overwrite: bool) -> None:
    if out.is_dir() != (format == "pyg") and out.exists():
        raise UserError(f"--out {out} is a {'folder' if out.is_dir() else 'file'}; give another path")
    for file in (None,) if format == "safetensors" else PYG_FILES:
        check_output(out, [expanded(run)], file=file)
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; give another path, or --overwrite to replace it")
    taken = [] if format == "safetensors" else [name for name in PYG_FILES if (out / name).exists()]
    if taken and not _is_export(out):
        raise UserError(f"--out {out} holds a {taken[0]} that is no export of dngd; give another path")


def _is_export(folder: Path) -> bool:
    """Whether model.py in a folder begins as those of `dngd export` do, of whichever version."""
    module = folder / PYG_FILES[0]
    title = inspect.getsource(pyg_export).partition("\n")[0].encode()
    if not module.is_file():
        return False
    with open(module, "rb") as file:
        return file.read(len(title)) == title


def to_pyg(model: GNN) -> pyg_export.PlainGNN:
    """Return a plain PyG module with a model's weights, in evaluation mode; it gives the same logits."""
    layers = model.graph_layers()
    kind = "gcn" if model.aggregation == "gcn" else "sage"
    parts = 1 if kind == "gcn" else 2
    widths = [layers[0].linear.in_features // parts, *(layer.linear.out_features for layer in layers)]
    plain = pyg_export.PlainGNN(kind, widths, model.dropout)
    weights: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        weight, bias = layer.linear.weight.detach(), layer.linear.bias.detach()
        if kind == "gcn":
            weights |= {f"convs.{index}.lin.weight": weight, f"convs.{index}.bias": bias}
        else:
            own, neighbours = weight.chunk(2, dim=1)
            weights |= {f"convs.{index}.lin_root.weight": own, f"convs.{index}.lin_rel.weight": neighbours}
            weights[f"convs.{index}.lin_rel.bias"] = bias
    plain.load_state_dict(weights)
    return plain.eval()


def _file_of(trained: TrainedModel) -> bytes:
    config = trained.config
    said = _said(trained) | {
        "model": config.model,
        "num_features": str(trained.num_features),
        "num_classes": str(trained.num_classes),
        "num_layers": str(config.num_layers),
        "hidden": str(config.hidden),
        "dropout": repr(config.dropout),
    }
    return _saved(trained.model.state_dict(), said)


def _write_pyg(trained: TrainedModel, out: Path) -> None:
    if not isinstance(trained.model, GNN):
        raise UserError(
            f"run {trained.folder.path} trained a module of one's own, which is a torch module as it is; use "
            "dngd.Trainer(config, module=...).best_model(), or --format safetensors for its weights"
        )
    plain = to_pyg(trained.model)
    widths = [trained.num_features, *(layer.linear.out_features for layer in trained.model.graph_layers())]
    said = {"kind": plain.kind, "widths": json.dumps(widths), "dropout": repr(trained.model.dropout)}
    out.mkdir(parents=True, exist_ok=True)
    module, weights = (out / name for name in PYG_FILES)
    replace_file(module, inspect.getsource(pyg_export).encode())
    replace_file(weights, _saved(plain.state_dict(), _said(trained) | said))


def _said(trained: TrainedModel) -> dict[str, str]:
    names = {} if trained.label_names is None else {"label_names": json.dumps(trained.label_names)}
    return names | {
        "dngd.version": dngd_version(),
        "dngd.run": printable(trained.folder.path.resolve().name),
        "dngd.step": str(trained.step),
        "labels": "several" if trained.is_multilabel else "one",
    }


def _saved(weights: dict[str, Tensor], said: dict[str, str]) -> bytes:
    return weights_file(host_copies(weights), said)
