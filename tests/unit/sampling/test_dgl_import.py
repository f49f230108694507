"""`import dgl` works, in each order in which it can come about. Each test is a fresh interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.unit.sampling.graphs import run_python

DGL_FOLDER = Path(next(iter(importlib.util.find_spec("dgl").submodule_search_locations)))  # type: ignore[arg-type,union-attr]
MATCHES = bool(list((DGL_FOLDER / "graphbolt").glob(f"*_{torch.__version__.split('+')[0]}.*")))
only_on_other_torch = pytest.mark.skipif(MATCHES, reason="DGL's own libraries match this torch")

WORKS = """
import torch
block = dgl.to_block(dgl.graph(([0, 1], [2, 2])), torch.tensor([2]))
assert block.num_src_nodes() == 3
"""


def ok(code: str, **environment: str) -> str:
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_imports_neither_torch_nor_dgl() -> None:
    ok("import sys, dngd.sampling; assert not {'torch', 'dgl', 'numpy', 'ray'} & set(sys.modules)")


@pytest.mark.slow
def test_plain_import_after_ours_prints_nothing_and_writes_no_settings(tmp_path: Path) -> None:
    code = """
import os
os.environ.pop("DGLBACKEND", None)
import dngd.sampling
import dgl
assert dngd.sampling.import_dgl() is dgl
"""
    assert ok(code + WORKS, HOME=str(tmp_path), DGLDEFAULTDIR=str(tmp_path / "dgl")) == ""
    assert list(tmp_path.iterdir()) == []


@only_on_other_torch
def test_stand_in_names_what_is_missing_and_harms_nobody() -> None:
    ok(
        """
import doctest, importlib, importlib.util, inspect, pickle, pkgutil, sys, types
from dngd.sampling import dgl_parts, import_dgl
dgl = import_dgl()

def refused(action):
    try:
        action()
    except ImportError as error:
        assert "graphbolt" in str(error) or "sparse" in str(error), error
        assert "torch" in str(error) and "install" in str(error), error
    else:
        raise AssertionError(action)

refused(lambda: dgl.graphbolt.FusedCSCSamplingGraph)
refused(lambda: importlib.import_module("dgl.graphbolt"))
refused(lambda: importlib.import_module("dgl.graphbolt.dataloader"))
refused(lambda: importlib.import_module("dgl.sparse"))
refused(lambda: exec("from dgl.graphbolt import ItemSet"))
refused(lambda: dgl.distributed.partition.gb.expand_indptr)

missing = dgl.graphbolt
assert isinstance(missing, types.ModuleType)
assert not hasattr(missing, "__wrapped__") and not hasattr(missing, "_repr_html_")
inspect.getmembers(missing), inspect.getdoc(missing), inspect.isclass(missing), dir(missing), repr(missing)
inspect.getmodule(dgl.DGLGraph), inspect.unwrap(missing), inspect.stack()
doctest.DocTestFinder().find(missing, "gb")
exec("from dgl import *")
names = {name: value for name, value in vars(missing).items() if not name.startswith("_")}
assert not names, names
class Probe: pass
def searched(): pass
searched.__module__ = None  # pickle looks through every attribute of sys.modules for it
pickle._Pickler, pickle.whichmodule(searched, "FusedCSCSamplingGraph"), pickle.dumps(Probe)
assert importlib.util.find_spec("dgl.graphbolt") is not None
assert [name for name in dir(missing) if not name.startswith("_")] == []

import setuptools, torch.utils.data
assert len(torch.utils.data.DataLoader(range(3))) == 3
if importlib.util.find_spec("torch_geometric"):
    import torch_geometric.loader

parts = dgl_parts()
assert {name: part.usable for name, part in parts.items()} == {
    "core": True, "graphbolt": False, "sparse": False, "tensor adapter": False}, parts
"""
    )


@pytest.mark.skipif(not MATCHES, reason="DGL's own libraries are for another torch")
def test_dgl_is_untouched_where_its_libraries_match() -> None:
    ok(
        """
from dngd.sampling import dgl_parts, import_dgl
dgl = import_dgl()
assert dgl.graphbolt.FusedCSCSamplingGraph and "dgl.graphbolt" in __import__("sys").modules
import dgl.sparse
assert all(part.usable for part in dgl_parts().values()), dgl_parts()
"""
    )


@pytest.mark.slow
@only_on_other_torch
def test_ours_after_a_failed_import_from_many_threads() -> None:
    ok(
        """
import sys
try:
    import dgl
except Exception:
    assert any(name.startswith("dgl.") for name in sys.modules)
else:
    raise AssertionError("expected DGL's own import to fail here")
from concurrent.futures import ThreadPoolExecutor
from dngd.sampling import import_dgl
with ThreadPoolExecutor(8) as pool:
    modules = list(pool.map(lambda _: import_dgl(), range(8)))
dgl = modules[0]
assert all(module is dgl and module.distributed for module in modules)
for name in list(sys.modules):
    if name.startswith("dgl.") and name.count(".") == 1:
        assert hasattr(dgl, name[4:]), name
"""
        + WORKS
    )


@pytest.mark.slow
@only_on_other_torch
def test_a_dgl_that_the_user_made_work_is_used_as_it_is() -> None:
    ok(
        """
import os, sys, types
os.environ["DGLBACKEND"] = "pytorch"
theirs = sys.modules["dgl.graphbolt"] = types.ModuleType("dgl.graphbolt")
import dgl
from dngd.sampling import dgl_parts, import_dgl
assert import_dgl() is dgl
assert sys.modules["dgl.graphbolt"] is theirs
assert not dgl_parts()["graphbolt"].usable
"""
        + WORKS
    )


def refusal(setup: str, **environment: str) -> str:
    return ok(
        setup
        + """
from dngd.errors import UserError
from dngd.sampling import dgl_parts, import_dgl
try:
    import_dgl()
except UserError as error:
    print(error)
else:
    raise AssertionError("no error")
assert not any(part.usable for part in dgl_parts().values())
""",
        **environment,
    )


def test_missing_dgl_says_how_to_install_it() -> None:
    assert "pip install 'dgl>=2.1,<2.2'" in refusal("import sys; sys.modules['dgl'] = None")


def test_missing_dependency_of_dgl_is_named() -> None:
    assert "pip install pandas" in refusal("import sys; sys.modules['pandas'] = None")


def test_core_library_that_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "libdgl.so").write_bytes(b"not a library")
    said = refusal("", DGL_LIBRARY_PATH=str(tmp_path))
    assert "libdgl.so cannot be loaded" in said
    assert "reinstall" in said


@pytest.mark.slow
@only_on_other_torch
def test_dgl_finds_a_packaging_where_none_is_installed() -> None:
    ok(
        """
import importlib.abc, sys
class NoPackaging(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "packaging":
            raise ModuleNotFoundError("No module named 'packaging'", name=name)
sys.meta_path.insert(0, NoPackaging())
from dngd.sampling import import_dgl
dgl = import_dgl()
assert "packaging" not in sys.modules
"""
        + WORKS
    )
