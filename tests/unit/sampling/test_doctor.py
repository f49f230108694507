"""The diagnosis: what decides the exit code, and that every fault comes with its fix."""

from __future__ import annotations

import io
import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from dngd import doctor
from dngd.doctor import Diagnosis, Finding, diagnose
from dngd.sampling.dgl_import import PartStatus


def rendered(diagnosis: Diagnosis) -> str:
    console = Console(file=io.StringIO(), width=80)
    diagnosis.render(console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_every_fault_has_a_fix_and_the_json_says_the_same() -> None:
    diagnosis = diagnose()
    for finding in diagnosis.findings:
        assert finding.status == "ok" or finding.fix, finding
    report = json.loads(diagnosis.to_json())
    assert report["exit_code"] == diagnosis.exit_code
    assert [entry["name"] for entry in report["findings"]] == [finding.name for finding in diagnosis.findings]
    names = {finding.name for finding in diagnosis.findings}
    assert names >= {
        "python",
        "torch",
        "CUDA",
        "dgl core",
        "dgl graphbolt",
        "ray",
        "pyarrow",
        "torch-geometric",
    }
    assert all(name in rendered(diagnosis) for name in names)


@pytest.mark.parametrize(
    ("status", "required", "code"),
    [("ok", True, 0), ("untested", True, 0), ("missing", False, 0), ("missing", True, 1)],
)
def test_exit_code(status: doctor.Status, required: bool, code: int) -> None:
    assert Diagnosis((Finding("it", "1.0", status, required, "do this"),)).exit_code == code


def test_missing_and_untested_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ray": "2.99.0"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: None)
    findings = {finding.name: finding for finding in diagnose().findings}
    assert findings["ray"].status == "untested"
    assert "only tested with" in findings["ray"].fix
    assert findings["pyarrow"].status == "missing"
    assert findings["pyarrow"].fix.startswith("pip install")


@pytest.mark.parametrize(
    ("lacking", "extras", "status", "code"),
    [
        ("tensorboardX", "train", "missing", 1),
        ("colorful", "default", "untested", 0),
        ("requests", "default,train", "missing", 1),
    ],
)
def test_ray_without_its_extras(
    monkeypatch: pytest.MonkeyPatch, lacking: str, extras: str, status: str, code: int
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == lacking:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    diagnosis = diagnose()
    [finding] = [one for one in diagnosis.findings if one.name == "ray"]
    assert finding.found == f"{real('ray')}, without all of ray[{extras}]"
    assert (finding.status, diagnosis.exit_code) == (status, code)
    assert finding.fix == "pip install 'ray[train,default]>=2.55,<3'"


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("ray", "2.54.9", "too old"),
        ("ray", "3.0.0", "too new"),
        ("numpy", "1.25.2", "too old"),
        ("pydantic", "2.5.3", "too old"),
        ("pydantic", "2.6.0", "ok"),
        ("torch", "2.1.2+cpu", "too old"),
        ("torch", "2.14.0+cu130", "too new"),
        ("torch", "2.13.0+cu130", "ok"),
        ("torch", "2.12.0.dev20260101", "untested"),
        ("torch", "of one's own", "untested"),
        ("dgl", "2.2.1", "too new"),
    ],
)
def test_versions_that_do_not_do_are_failures(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, status: str
) -> None:
    real = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda asked: version if asked == name else real(asked))
    monkeypatch.setattr("torch.__version__", version if name == "torch" else "2.13.0")
    if name == "dgl":
        monkeypatch.setattr(doctor, "dgl_parts", lambda: {"core": PartStatus(True, f"dgl {version}")})
    diagnosis = diagnose()
    [finding] = [one for one in diagnosis.findings if one.name.removesuffix(" core") == name]
    assert finding.status == status
    if status.startswith("too"):
        assert finding.fix.startswith(f"pip install '{name}")
        assert diagnosis.exit_code == 1
        assert status in rendered(diagnosis)


def test_the_versions_are_those_of_the_project() -> None:
    project = (Path(doctor.__file__).parents[1] / "pyproject.toml").read_text()
    [listed] = re.findall(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert sorted(re.findall(r'^ +"(.*)",$', listed, re.MULTILINE)) == sorted(
        requirement for _, requirement in doctor._PACKAGES.values()
    )


def test_unusable_dgl_core_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "core": PartStatus(False, "DGL is not installed"),
        "graphbolt": PartStatus(False, "needs the core"),
    }
    monkeypatch.setattr(doctor, "dgl_parts", lambda: parts)
    diagnosis = diagnose()
    assert diagnosis.exit_code == 1
    assert "DGL is not installed" in rendered(diagnosis)
    assert "cannot run here" in rendered(diagnosis)


def test_too_many_threads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    finding = next(finding for finding in diagnose().findings if finding.name == "OMP_NUM_THREADS")
    assert finding.status == "untested"
    assert "unset it" in finding.fix


def test_what_was_found_is_printed_as_it_is() -> None:
    """Not as rich's markup."""
    said = rendered(Diagnosis((Finding("a [/x]", "b [red] :x:", "missing", False, "c [/y] :x:"),)))
    for text in ("a [/x]", "b [red] :x:", "c [/y] :x:", "missing"):
        assert text in said
