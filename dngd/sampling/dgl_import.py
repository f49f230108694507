"""Imports DGL, on torch and setuptools releases that DGL itself no longer imports on too.

DGL 2.1.0 is made of a core (`libdgl.so`: graphs, neighbour sampling, to_block, SpMM), which works with any
torch, and of three libraries (graphbolt, sparse, tensor adapter), each compiled for one exact torch version.
`import dgl` imports graphbolt and so fails on every other torch (dmlc/dgl issues 7157, 7247, 7822, 7835).

This module owns an import hook that changes only that: where graphbolt cannot load, the import machinery is
handed a stand-in which raises ImportError when it is used. No file of DGL is touched, and where DGL's
libraries match the torch in use, DGL is imported as it is. The hook also makes a plain `import dgl` after
`import dngd.sampling` work. It does not import torch or DGL until DGL is asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dngd.errors import UserError

INSTALL_HINT = "pip install 'dgl>=2.1,<2.2'"
COMPILED_PARTS = {"dgl.graphbolt": "graphbolt", "dgl.sparse": "dgl_sparse"}

_lock = threading.RLock()
_core_loading = threading.Event()


@dataclass(frozen=True)
class PartStatus:
    """Whether one part of DGL can be used here.

    detail: the version or file in use; where usable is False, why not and what to do.
    """

    usable: bool
    detail: str


class StandIn(types.ModuleType):
    """A module that could not be loaded; every use of it says so.

    Names that start with an underscore raise AttributeError, as on any module, because the import machinery,
    inspect, doctest, pickle and notebooks probe them on modules they do not use.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        reason = self.__dict__.get("_missing_because", "")
        raise ImportError(f"{self.__name__}.{name} cannot be used: {reason}", name=self.__name__)


def import_dgl() -> Any:
    """Return the `dgl` module, imported once; a DGL that the caller imported before is used as it is.

    Raises UserError when DGL is not installed, or when its core cannot load.
    """
    with _lock:
        install_import_hook()
        try:
            return importlib.import_module("dgl")
        except ModuleNotFoundError as error:
            if error.name == "dgl":
                raise UserError(f"DGL is not installed; install it with: {INSTALL_HINT}") from error
            raise UserError(
                f"DGL needs the package {error.name!r}, which is not installed; install it with: "
                f"pip install {str(error.name).split('.')[0]}"
            ) from error
        except OSError as error:
            raise UserError(
                f"DGL's core library libdgl.so cannot be loaded ({error}); reinstall it with: "
                f"pip install --force-reinstall --no-deps 'dgl>=2.1,<2.2', on Linux x86-64 or macOS"
            ) from error
        except Exception as error:
            raise UserError(
                f"DGL's core cannot be imported ({type(error).__name__}: {error}); install a tested version "
                f"with: {INSTALL_HINT}"
            ) from error


def dgl_parts() -> dict[str, PartStatus]:
    """Return the status of DGL's core, graphbolt, sparse and tensor adapter. Imports DGL; never raises."""
    try:
        dgl = import_dgl()
    except UserError as error:
        message = str(error)
        unusable = PartStatus(False, "needs the core")
        return {
            "core": PartStatus(False, message),
            "graphbolt": unusable,
            "sparse": unusable,
            "tensor adapter": unusable,
        }
    folder = Path(dgl.__file__).parent
    parts = {"core": PartStatus(True, f"dgl {dgl.__version__}")}
    for module_name, short in (("dgl.graphbolt", "graphbolt"), ("dgl.sparse", "sparse")):
        try:
            module = importlib.import_module(module_name)
            reason = module.__dict__.get("_missing_because")
            if reason is None and isinstance(module, types.ModuleType) and not hasattr(module, "__file__"):
                reason = "replaced by another package's stand-in"
        except Exception as error:
            reason = str(error)
        library = _library(folder, COMPILED_PARTS[module_name])
        parts[short] = PartStatus(reason is None, reason or (library.name if library else "loaded"))
    library = _library(folder, "tensoradapter")
    loaded = bool(getattr(sys.modules.get("dgl._ffi.base"), "tensor_adapter_loaded", False))
    detail = library.name if library else _no_library(folder, "tensoradapter")
    parts["tensor adapter"] = PartStatus(loaded, detail)
    return parts


def install_import_hook() -> None:
    """Make `import dgl` work in this process where DGL's own graphbolt library does not; idempotent."""
    with _lock:
        if not any(isinstance(finder, _DglFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _DglFinder())


class _DglFinder(importlib.abc.MetaPathFinder):
    """Finds `dgl` and the parts that need care as the other finders do, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _LOADERS:
            return None
        spec = self._ask_others(fullname, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        spec.loader = _LOADERS[fullname](spec.loader)
        return spec

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in list(sys.meta_path):
            if isinstance(finder, _DglFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Delegates to the loader that would have been used."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        # resource readers, inspect.getsource and pkgutil ask the loader for more than the two methods below
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._inner.exec_module(module)


class _CoreLoader(_Loader):
    """Loads `dgl`, and sees that nothing of ours is left where others look."""

    def exec_module(self, module: types.ModuleType) -> None:
        # A failed import leaves submodules behind that would be taken for whole ones.
        _forget_submodules("dgl")
        # Otherwise DGL prints a notice and writes a settings file into the home folder.
        os.environ.setdefault("DGLBACKEND", "pytorch")
        borrowed = _lend_packaging()
        _core_loading.set()
        try:
            self._inner.exec_module(module)
        except BaseException:
            _forget_submodules("dgl")
            raise
        finally:
            _core_loading.clear()
            for name in borrowed:
                sys.modules.pop(name, None)
        # pickle and others walk sys.modules and read any attribute: a stand-in must not be found there.
        # DGL's own modules and `dgl.graphbolt` still reach it; importing it anew raises (see _PartLoader).
        if isinstance(sys.modules.get("dgl.graphbolt"), StandIn):
            del sys.modules["dgl.graphbolt"]


class _AdapterLoader(_Loader):
    """Loads `dgl._ffi.base`, which loads the tensor adapter: a second time in a process, that aborts it.

    A second time comes when an import of DGL failed after it, and is tried again.
    """

    loaded = False

    def exec_module(self, module: types.ModuleType) -> None:
        self._inner.exec_module(module)
        if _AdapterLoader.loaded:
            module.__dict__.update(tensor_adapter_loaded=True, load_tensor_adapter=lambda *_: None)


class _PartLoader(_Loader):
    """Loads a compiled part where its library matches the torch in use."""

    def exec_module(self, module: types.ModuleType) -> None:
        reason = _why_missing(module)
        if reason is None:
            try:
                self._inner.exec_module(module)
                return
            except Exception as error:
                _forget_submodules(module.__name__)
                reason = f"its library did not load ({type(error).__name__}: {error})"
        message = f"DGL's part {module.__name__} is missing here: {reason}"
        if not _core_loading.is_set():
            raise ImportError(message, name=module.__name__)
        for name in [name for name in vars(module) if not name.startswith("__")]:
            delattr(module, name)
        module.__dict__["_missing_because"] = message
        # `from dgl.graphbolt import *` must import nothing rather than fail on a name of its own.
        module.__dict__["__all__"] = []
        module.__class__ = StandIn


_LOADERS: dict[str, type[_Loader]] = {
    "dgl": _CoreLoader,
    "dgl._ffi.base": _AdapterLoader,
    "dgl.graphbolt": _PartLoader,
    "dgl.sparse": _PartLoader,
}


def _why_missing(module: types.ModuleType) -> str | None:
    """Return why this compiled part cannot load, or None where its files say that it can."""
    folder = Path(str(module.__file__)).parent.parent
    part = COMPILED_PARTS[module.__name__]
    if _library(folder, part) is None:
        return _no_library(folder, part)
    if module.__name__ == "dgl.graphbolt":
        for needed in ("torchdata.datapipes", "torchdata.dataloader2"):
            if not _importable(needed):
                return f"{needed} is not in the installed torchdata; pip install 'torchdata>=0.6,<0.10'"
    return None


def _library(folder: Path, part: str) -> Path | None:
    """Return the compiled library of a part for the torch in use, or None.

    folder: DGL's package folder, or the folder that its core library was found in.
    """
    import torch

    version = torch.__version__.split("+", maxsplit=1)[0]
    where = {"graphbolt": "graphbolt", "dgl_sparse": "dgl_sparse", "tensoradapter": "tensoradapter/pytorch"}
    infix = "" if os.name != "nt" else "*"
    names = (
        f"lib{part}_pytorch_{version}.so",
        f"lib{part}_pytorch_{version}.dylib",
        f"{infix}{part}_pytorch_{version}.dll",
    )
    for root in [folder, *_core_folders()]:
        for name in names:
            for path in (root / where[part]).glob(name):
                return path
    return None


def _core_folders() -> list[Path]:
    """DGL looks for its parts beside its core library, which a build from source keeps elsewhere."""
    libinfo = sys.modules.get("dgl._ffi.libinfo")
    if libinfo is None:
        return []
    return [Path(found).parent for found in libinfo.find_lib_path(optional=True) or []]


def _no_library(folder: Path, part: str) -> str:
    import torch

    where = "tensoradapter/pytorch" if part == "tensoradapter" else part
    built = sorted(
        (path.stem.rsplit("_", 1)[-1] for path in (folder / where).glob(f"*{part}_pytorch_*")),
        key=lambda version: [int(number) if number.isdigit() else 0 for number in version.split(".")],
    )
    for_which = f"torch {built[0]} to {built[-1]}" if built else "no torch"
    return (
        f"this DGL ships the compiled {part} library for {for_which}, not for torch {torch.__version__}; "
        f"dngd does not need it; to use it, install one of those torch versions"
    )


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _lend_packaging() -> list[str]:
    """Give DGL a `packaging` where there is none, and return the module names to take back.

    DGL falls back to `setuptools.extern.packaging`, which setuptools 71 dropped for a plain vendored copy.
    """
    if _importable("packaging") or _importable("setuptools.extern.packaging"):
        return []
    for vendored in ("setuptools._vendor.packaging", "pip._vendor.packaging"):
        try:
            packaging = importlib.import_module(vendored)
            importlib.import_module(f"{vendored}.version")
        except ImportError:
            continue
        names = ["packaging", "packaging.version"]
        sys.modules["packaging"] = packaging
        sys.modules["packaging.version"] = packaging.version
        return names
    return []


def _forget_submodules(parent: str) -> None:
    if getattr(sys.modules.get(f"{parent}._ffi.base"), "tensor_adapter_loaded", False):
        _AdapterLoader.loaded = True
    for name in [name for name in sys.modules if name.startswith(f"{parent}.")]:
        del sys.modules[name]
