"""Control groups: where they are made, what is refused, and, where this machine allows one, that it limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dngd.bench import cgroup
from dngd.bench.cgroup import MemoryGroup, NotAllowedError, memory_group

V1 = "25 20 0:22 {root} {point} rw,relatime - cgroup cgroup rw,memory"
OTHER = "24 20 0:21 / {point}-cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2 = "26 20 0:23 {root} {point} rw,relatime - cgroup2 cgroup2 rw"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    monkeypatch.setattr(cgroup, "PROC", folder)
    return folder


def say(proc: Path, own: str, mounts: str, point: Path, root: str = "/") -> None:
    (proc / "cgroup").write_text(own)
    (proc / "mountinfo").write_text(mounts.format(point=point, root=root) + "\n")


def parent_of(name: str) -> tuple[Path, int]:
    """Return the folder that a group would be made in, which does not exist, as the error names it."""
    with pytest.raises(NotAllowedError, match="no group can be made in ") as refused, memory_group(name):
        pass
    text = str(refused.value).removeprefix("no group can be made in ").partition(": ")[0]
    return Path(text), cgroup._parent()[1]


def test_version_1_is_made_below_this_processs_own(proc: Path, tmp_path: Path) -> None:
    point = tmp_path / "memory"
    say(proc, "5:cpu,cpuacct:/other\n4:memory:/jobs/7\n0::/\n", f"{OTHER}\n{V1}", point)
    assert parent_of("x") == (point / "jobs" / "7", 1)


def test_version_1_in_a_container_that_sees_its_part_as_all(proc: Path, tmp_path: Path) -> None:
    point = tmp_path / "memory"
    say(proc, "4:memory:/docker/abc/inner\n", V1, point, root="/docker/abc")
    assert parent_of("x") == (point / "inner", 1)
    say(proc, "4:memory:/docker/abc\n", V1, point, root="/docker/abcd")
    assert parent_of("x") == (point, 1)


def test_version_2_is_made_beside(proc: Path, tmp_path: Path) -> None:
    point = tmp_path / "unified"
    say(proc, "0::/user.slice/app.scope\n", V2, point)
    assert parent_of("x") == (point / "user.slice", 2)
    say(proc, "0::/\n", V2, point)
    assert parent_of("x") == (point, 2)


@pytest.mark.parametrize(
    ("own", "mounts", "why"),
    [
        ("3:cpu:/\n", V1, "in no control group"),
        ("4:memory:/a\n", V2, "no cgroup file system with memory limits is mounted"),
        ("0::/a\n", V1, "no cgroup2 file system"),
    ],
)
def test_systems_without(proc: Path, tmp_path: Path, own: str, mounts: str, why: str) -> None:
    say(proc, own, mounts, tmp_path / "memory")
    with pytest.raises(NotAllowedError, match=why), memory_group("x"):
        pass


def test_a_system_without_proc(proc: Path) -> None:
    with pytest.raises(NotAllowedError, match="no control groups"), memory_group("x"):
        pass


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = [f"x-{os.getpid()}", f"y-{gone.pid}", "x-", "x-12b"]
    for name in (*kept, f"x-{gone.pid}"):
        (tmp_path / name).mkdir()
    cgroup.remove_leftovers(tmp_path, "x", lambda folder: folder.rmdir())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(kept)


def test_a_hierarchy_that_does_not_limit_memory_is_refused_and_left_clean(proc: Path, tmp_path: Path) -> None:
    point = tmp_path / "unified"
    (point / "slice").mkdir(parents=True)
    say(proc, "0::/slice/app\n", V2, point)
    with pytest.raises(NotAllowedError, match=r"have no memory\.max, memory\.peak"), memory_group("x"):
        pass
    assert not list((point / "slice").iterdir())


@pytest.mark.parametrize(
    ("version", "written"),
    [
        (1, {"memory.limit_in_bytes": "5000", "memory.memsw.limit_in_bytes": "5000"}),
        (2, {"memory.max": "5000", "memory.swap.max": "0"}),
    ],
)
def test_limits_are_written(tmp_path: Path, version: int, written: dict[str, str]) -> None:
    for name in written:
        (tmp_path / name).touch()
    group = MemoryGroup(tmp_path, version)
    group.limit(5000)
    assert {name: (tmp_path / name).read_text() for name in written} == written
    (tmp_path / {1: "memory.max_usage_in_bytes", 2: "memory.peak"}[version]).write_text("77\n")
    assert group.peak_bytes() == 77
    assert group.processes == tmp_path / "cgroup.procs"


def test_it_limits_a_process_here() -> None:
    """A real group, where this machine gives one: a process beyond its limit is killed, one within is not."""
    work = "import sys; sys.stdin.readline(); held = b'x' * int(sys.argv[1]); print(len(held))"
    try:
        with memory_group("dngd-test") as group:
            group.limit(64 << 20)
            codes = []
            for size in (8 << 20, 256 << 20):
                process = subprocess.Popen(
                    [sys.executable, "-c", work, str(size)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
                )
                group.processes.write_text(str(process.pid))
                process.communicate(b"go\n")
                codes.append(process.returncode)
            assert codes == [0, -9]
            assert 8 << 20 < group.peak_bytes() <= 64 << 20
    except NotAllowedError as error:
        pytest.skip(f"this machine gives no memory-limited group: {error}")
    assert not group.folder.exists()
