"""What this machine has of what dngd needs, and what to do about the rest: `dngd doctor`.

Owns the table of versions with a recorded run of the tests (TESTED). Does not import ray, which is slow.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dngd.limits import available_memory, usable_cpus
from dngd.sampling.dgl_import import INSTALL_HINT, dgl_parts

Status = Literal["ok", "untested", "too old", "too new", "missing"]
FAILURES: tuple[Status, ...] = ("too old", "too new", "missing")

TESTED: dict[str, tuple[str, ...]] = {
    "python": ("3.11",),
    "torch": ("2.13.0",),
    "dgl": ("2.1.0",),
    "ray": ("2.60.0",),
    "pyarrow": ("26.0.1",),
    "numpy": ("2.4.6",),
    "torch-geometric": ("2.8.1",),
}
"""Versions with a recorded run of the tests; a patch release of Python counts as its minor version."""

SUPPORTED_PYTHON = ((3, 10), (3, 12))

# package: (whether dngd needs it to run, what pip installs)
_PACKAGES: dict[str, tuple[bool, str]] = {
    "torch": (True, "torch>=2.2,<2.14"),
    "dgl": (True, "dgl>=2.1,<2.2"),
    "numpy": (True, "numpy>=1.26,<3"),
    "ray": (True, "ray[train,default]>=2.55,<3"),
    "pyarrow": (True, "pyarrow>=15"),
    "torch-geometric": (False, "torch-geometric>=2.5,<3"),
    "scipy": (True, "scipy>=1.11"),
    "pandas": (True, "pandas>=2"),
    "pydantic": (True, "pydantic>=2.6,<3"),
    "safetensors": (True, "safetensors>=0.4"),
    "typer": (True, "typer>=0.12"),
    "rich": (True, "rich>=13"),
    "psutil": (True, "psutil>=5.9"),
    "pyyaml": (True, "pyyaml>=6"),
    "packaging": (True, "packaging>=22"),
    "typing_extensions": (True, "typing_extensions>=4.4"),
}
"""The dependencies of pyproject.toml, in its words."""

_IMPORTED = ("torch", "dgl")
"""Those that are imported to be looked at; of the others the installed version says enough."""

_LOW_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    found: the version or amount. status: "untested" is a warning; one of FAILURES is an error where required.
    fix: what to do, empty when nothing needs doing.
    """

    name: str
    found: str
    status: Status
    required: bool = False
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order of their rendering."""

    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0, or 1 when something required is missing, too old or new, or cannot be used."""
        return int(any(finding.required and finding.status in FAILURES for finding in self.findings))

    def to_json(self) -> str:
        """Return {"exit_code": ..., "findings": [{"name", "found", "status", "required", "fix"}, ...]}."""
        findings = [asdict(finding) for finding in self.findings]
        return json.dumps({"exit_code": self.exit_code, "findings": findings}, indent=2)

    def render(self, console: Console) -> None:
        """Print the findings as a table, then each fix on a line of its own, so that it can be copied."""
        colours = {"ok": "green", "untested": "yellow"} | dict.fromkeys(FAILURES, "red")
        table = Table(box=None, pad_edge=False)
        for title in ("", "found", "status"):
            table.add_column(title, overflow="fold")
        for finding in self.findings:
            colour = colours[finding.status]
            if finding.status in FAILURES and not finding.required:
                colour = "yellow"
            table.add_row(Text(finding.name), Text(finding.found), Text(finding.status, style=colour))
        console.print(table)
        for finding in self.findings:
            if finding.fix:
                console.print(Text(f"{finding.name}: {finding.fix}"), soft_wrap=True)
        verdict = "dngd can run here" if self.exit_code == 0 else "dngd cannot run here: see the fixes above"
        console.print(verdict, style="bold")


def diagnose() -> Diagnosis:
    """Look at this process's packages, devices, threads and memory. Imports torch and dgl; never raises."""
    findings = [_python(), _torch(), *_dgl(), *(_package(name) for name in _PACKAGES if name not in _IMPORTED)]
    findings += [*_devices(), *_threads(), _memory()]
    return Diagnosis(tuple(findings))


def _python() -> Finding:
    first, last = SUPPORTED_PYTHON
    minor = sys.version_info[:2]
    supported = first <= minor <= last
    fix = "" if supported else f"use Python {first[0]}.{first[1]} to {last[0]}.{last[1]}"
    status: Status = "missing"
    if supported:
        status = "ok" if f"{minor[0]}.{minor[1]}" in TESTED["python"] else "untested"
    return Finding("python", platform.python_version(), status, True, fix or _version_fix("python", status))


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        found = f"cannot be imported ({type(error).__name__}: {error})"
        return Finding("torch", found, "missing", True, _install("torch"))
    version = str(torch.__version__)
    status = _status("torch", version)
    return Finding("torch", version, status, True, _version_fix("torch", status))


def _dgl() -> list[Finding]:
    parts = dgl_parts()
    core = parts.pop("core")
    status: Status = "missing"
    if core.usable:
        status = _status("dgl", core.detail.removeprefix("dgl "))
    fix = _version_fix("dgl", status) if core.usable else f"{core.detail}; e.g. {INSTALL_HINT}"
    findings = [Finding("dgl core", core.detail if core.usable else "not usable", status, True, fix)]
    for name, part in parts.items():
        found = part.detail if part.usable else "not usable, and not needed by dngd"
        fix = "" if part.usable else part.detail
        findings.append(Finding(f"dgl {name}", found, "ok" if part.usable else "missing", False, fix))
    return findings


def _package(name: str) -> Finding:
    required = _PACKAGES[name][0]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", "missing", required, _install(name))
    status = _status(name, version)
    if status not in FAILURES and (extras := _lacking(name)):
        found = f"{version}, without all of {name}[{','.join(extras)}]"
        # Only a warning for default: conda's py-spy, say, is there without being a package to Python.
        return Finding(name, found, "missing" if "train" in extras else "untested", required, _install(name))
    return Finding(name, version, status, required, _version_fix(name, status))


def _lacking(name: str) -> list[str]:
    """Return those of the extras that dngd needs of a package of which something is not installed."""
    needed = [Requirement(text) for text in metadata.requires(name) or ()]
    return [
        extra
        for extra in sorted(Requirement(_PACKAGES[name][1]).extras)
        if any(not _installed(one.name) for one in needed if one.marker and _is_of(extra, one.marker))
    ]


def _is_of(extra: str, marker: Marker) -> bool:
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _status(name: str, version: str) -> Status:
    """Return what a package's version is; what follows its + is of the build."""
    if (refusal := _refusal(name, version)) is not None:
        return refusal
    return "ok" if name not in TESTED or version.split("+")[0] in TESTED[name] else "untested"


def _refusal(name: str, version: str) -> Status | None:
    """Return on which side of the versions that dngd needs a version is; None if it is one, or cannot be told."""
    try:
        found = Version(version)
    except InvalidVersion:
        return None
    refusing = [one for one in Requirement(_PACKAGES[name][1]).specifier if not one.contains(found, prereleases=True)]
    if not refusing:
        return None
    return "too old" if any(one.operator.startswith(">") for one in refusing) else "too new"


def _install(name: str) -> str:
    return f"pip install '{_PACKAGES[name][1]}'"


def _version_fix(name: str, status: Status) -> str:
    if status == "ok":
        return ""
    if status != "untested":
        return _install(name)
    return f"expected to work, but only tested with {' and '.join(TESTED[name])}"


def _devices() -> list[Finding]:
    try:
        import torch
    except Exception:
        return []
    if torch.cuda.is_available():
        findings = [Finding("CUDA", str(torch.version.cuda), "ok")]
        for number in range(torch.cuda.device_count()):
            device: Any = torch.cuda.get_device_properties(number)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            findings.append(Finding(f"GPU {number}", f"{device.name}, {memory}", "ok"))
        return findings
    if torch.version.cuda is not None:
        fix = "torch finds no GPU although a driver is loaded: see nvidia-smi" if _has_nvidia_driver() else ""
        return [Finding("CUDA", f"torch is built for {torch.version.cuda}; no GPU in use", "ok", fix=fix)]
    if _has_nvidia_driver():
        fix = "this torch has no CUDA; install a CUDA build of it to use the GPU (pytorch.org)"
        return [Finding("CUDA", "none, though an NVIDIA driver is loaded", "missing", False, fix)]
    return [Finding("CUDA", "none (CPU build of torch, no GPU)", "ok")]


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _threads() -> list[Finding]:
    cores = usable_cpus()
    findings = [Finding("CPU cores", str(cores), "ok")]
    setting = os.environ.get("OMP_NUM_THREADS")
    fix = ""
    if setting is not None and setting.isdigit() and int(setting) > cores:
        fix = f"more threads than the {cores} cores slow everything down; unset it or set at most {cores}"
    findings.append(Finding("OMP_NUM_THREADS", setting or "not set", "untested" if fix else "ok", fix=fix))
    try:
        import torch
    except Exception:
        return findings
    return [*findings, Finding("torch threads", str(torch.get_num_threads()), "ok")]


def _memory() -> Finding:
    available = available_memory()
    found = f"{available / 2**30:.1f} GiB"
    if available >= _LOW_MEMORY_BYTES:
        return Finding("free memory", found, "ok")
    fix = f"Ray and two workers want about {_LOW_MEMORY_BYTES // 2**30} GiB; use --engine local, or free some"
    return Finding("free memory", found, "untested", fix=fix)
