"""The house's rules: imports go one way, and ray, dgl and torch.distributed each have one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dngd"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "paths": set(),
    "allocator": set(),
    "limits": set(),
    "config": {"config_text", "config_uses"},
    "config_text": {"yaml_text"},
    "config_uses": set(),
    "yaml_text": set(),
    "graph": set(),
    "models": set(),
    "curvature": set(),
    "comm": set(),
    "report": {"yaml_text"},
    "sampling": {"graph", "models", "allocator"},
    "optim": {"curvature", "comm"},
    "train": {"optim", "sampling", "models", "graph", "comm", "config", "config_text", "allocator", "limits"},
    "launch": {"train", "config", "comm", "graph", "report"},
    "doctor": {"sampling", "limits"},
    "bench": {"train", "optim", "allocator", "limits", "sampling", "models", "graph", "comm", "config", "config_text"},
    "cli": {"launch", "train", "graph", "config", "config_text", "report", "doctor", "bench", "sampling", ""},
    "__main__": {"cli"},
    "": {"launch", "train", "graph", "config", "sampling", "models"},
}
"""Part -> the parts that it may import; dngd.errors and dngd.paths are open to all; "" is the package's __init__."""

ONE_PLACE = {"ray": "launch", "dgl": "sampling", "torch.distributed": "comm"}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, lazily or not, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return "" if relative.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0].removesuffix(".py")


def violations(path: Path, part: str, imported: set[str]) -> list[str]:
    out = []
    for name in imported:
        if name == "dngd" or name.startswith("dngd."):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 else ""
            if target not in ALLOWED:  # `from dngd import __version__`
                target = ""
            if target not in ALLOWED[part] | {part, "errors", "paths"}:
                out.append(f"{path.name} ({part}) imports {name}")
        for package, home in ONE_PLACE.items():
            if (name == package or name.startswith(package + ".")) and part != home:
                out.append(f"{path.name} ({part}) imports {name}, which belongs in {home}")
    return out


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert violations(path, part_of(path), imports_of(path)) == []


@pytest.mark.parametrize(
    ("part", "imported"),
    [
        ("curvature", "dngd.comm.packing"),
        ("optim", "dngd.train.loop"),
        ("models", "dngd.sampling"),
        ("train", "ray.train"),
        ("graph", "dgl"),
        ("optim", "torch.distributed"),
        ("train", "dngd.launch"),
        ("curvature", "dngd"),
        ("optim", "dngd.Trainer"),
        ("train", "dngd.bench.step"),
        ("bench", "dngd.launch"),
    ],
)
def test_a_wrong_import_is_seen(part: str, imported: str) -> None:
    assert violations(Path("x.py"), part, {imported})


def calls_of(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Every call as (dotted name, keyword sources)."""
    return [
        (ast.unparse(node.func), {str(k.arg): ast.unparse(k.value) for k in node.keywords})
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_nothing_unpickles_or_evaluates() -> None:
    """No pickle but the Planetoid importer's restricted unpickler; YAML and arrays only the safe way."""
    for path in FILES:
        for name, keywords in calls_of(path):
            assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load"}, (path, name)
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            if name in {"np.load", "numpy.load"}:
                assert keywords.get("allow_pickle") == "False", path
        if "pickle" in imports_of(path):
            # pyg.py names its exceptions.
            assert path.name in {"planetoid.py", "pyg.py"}, path
