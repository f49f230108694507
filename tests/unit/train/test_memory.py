"""The memory that is left: the machine's, or that of the narrowest control group."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from dngd import doctor, limits


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(limits, "PROC", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000}))
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_groups(groups: Path) -> None:
    assert limits.available_memory() == 5000


def test_version_2_and_the_groups_above(groups: Path) -> None:
    """`max` is no limit; file pages that could be dropped are room."""
    (groups / "cgroup").write_text("0::/outer/inner\n")
    write(groups / "fs" / "outer" / "inner", memory__max="max", memory__current="10", memory__stat="inactive_file 1")
    write(groups / "fs" / "outer", memory__max="4000", memory__current="3000", memory__stat="anon 5\ninactive_file 700")
    assert limits.available_memory() == 1700
    write(groups / "fs" / "outer" / "inner", memory__max="500", memory__current="600")
    assert limits.available_memory() == 0


def test_version_1(groups: Path) -> None:
    (groups / "cgroup").write_text("5:cpu:/\n4:memory:/group\n0::/\n")
    folder = groups / "fs" / "memory"
    write(folder / "group", memory__limit_in_bytes="3000", memory__usage_in_bytes="2000")
    write(folder / "group", memory__stat="inactive_file 1\ntotal_inactive_file 500")
    write(folder, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="9", memory__stat="cache 1")
    assert limits.available_memory() == 1500


def test_a_container_that_sees_its_group_as_the_root(groups: Path) -> None:
    (groups / "cgroup").write_text("0::/docker/abc\n")
    write(groups / "fs", memory__max="900", memory__current="100", memory__stat="inactive_file 0")
    assert limits.available_memory() == 800


def test_doctor_tells_the_same(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a container in a group below the root, with file pages that it could drop."""
    (groups / "cgroup").write_text("0::/pod\n")
    write(groups / "fs" / "pod", memory__max=f"{6 * 2**30}", memory__current=f"{6 * 2**30}")
    write(groups / "fs" / "pod", memory__stat=f"inactive_file {5 * 2**30}")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * 2**30}))
    [finding] = [one for one in doctor.diagnose().findings if one.name == "free memory"]
    assert (finding.found, finding.status) == ("5.0 GiB", "ok")
