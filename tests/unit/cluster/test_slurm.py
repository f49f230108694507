"""cluster/slurm.sh, with stand-ins for Slurm's commands and everything else real."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dngd.graph import GraphStore

SCRIPT = Path(__file__).parents[3] / "cluster" / "slurm.sh"

SRUN = """#!/bin/bash
# As Slurm since 22.05, which knows SLURM_CPUS_PER_TASK for sbatch alone.
if [ "$SRUN_CPUS_PER_TASK" != "$SLURM_CPUS_PER_TASK" ]; then echo "srun: a task gets one core" >&2; exit 9; fi
while [[ "$1" == --* ]]; do shift; done
if [ "$1" = ray ]; then stat --format %a "$RAY_AUTH_TOKEN_PATH" > "$RECORD/mode"; echo "$@" > "$RECORD/ray"; fi
exec "$@"
"""


def test_it_parses() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert SCRIPT.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(
    ("arguments", "job", "said"),
    [([], "7", "give a dngd command"), (["doctor"], None, "not inside a Slurm job")],
)
def test_mistakes(arguments: list[str], job: str | None, said: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | ({"SLURM_JOB_ID": job} if job else {})
    done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.rglob("token"))


@pytest.mark.parametrize(
    ("nodes", "own", "all_of_them", "head"),
    [
        (2, "10.0.0.7", "192.168.0.7 10.0.0.7", "10.0.0.7"),
        (2, "127.0.1.1", "10.0.0.7 172.17.0.1 fd00::2", "10.0.0.7"),
        (2, "::1 127.0.0.1", "fd00::2 10.0.0.7", "10.0.0.7"),
        (2, "", "10.0.0.7", "10.0.0.7"),
        (1, "127.0.0.1", "", "127.0.0.1"),
        (2, "127.0.0.1", "", None),
    ],
)
def test_the_address_of_the_head(nodes: int, own: str, all_of_them: str, head: str | None, tmp_path: Path) -> None:
    """One that the other nodes reach, whatever /etc/hosts says. Ray and dngd are stand-ins too."""
    binaries = write_commands(
        tmp_path / "bin",
        srun=SRUN,
        scontrol=f"printf 'node%s\\n' {' '.join(map(str, range(nodes)))}",
        hostname=f'if [ "$1" = --ip-address ]; then echo {own}; else echo {all_of_them}; fi',
        ray="exec sleep 60",
        python="cat > /dev/null",
        dngd='echo "dngd $*, head $RAY_ADDRESS"',
    )
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(tmp_path), "USER": "someone"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_CPUS_PER_TASK": "2"}
    environment |= {"RECORD": str(tmp_path)}
    command = [SCRIPT, "doctor"]
    done = subprocess.run(command, env=environment, input="", capture_output=True, text=True, timeout=60)
    if head is None:
        assert done.returncode == 1
        assert "slurm.sh: node node0 has no IPv4 address" in done.stderr
        return
    assert (done.returncode, done.stdout) == (0, f"dngd doctor, head {head}:20007\n"), done.stderr


def write_commands(folder: Path, **commands: str) -> Path:
    """Write stand-ins of commands, by name and as bash, into a new folder."""
    folder.mkdir()
    for name, content in commands.items():
        (folder / name).write_text(content if content.startswith("#!") else f"#!/bin/bash\n{content}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_that_slurm_ends(store: GraphStore, tmp_path: Path) -> None:
    """A cluster comes up, dngd trains on it, Slurm's signal ends both: exit code 130, no token left, no process."""
    binaries = write_commands(
        tmp_path / "bin",
        srun=SRUN,
        scontrol="echo localhost",
        hostname="echo 127.0.0.1",
        dngd=f'exec {sys.executable} -m dngd.cli "$@"',
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "2",
        "DNGD_SECRETS_DIR": str(tmp_path / "secrets"),
        "DNGD_CACHE_DIR": str(tmp_path / "cache"),
        "RECORD": str(tmp_path),
        "USER": "someone",
    }
    run = tmp_path / "run"
    command = ["train", "--dataset", str(store.path), "--num-layers", "2", "--fanout", "5,5", "--batch-size", "20"]
    command += ["--epochs", "100000", "--run-dir", str(run), "--set", "checkpoint.period_steps=20", "--resume"]
    with open(tmp_path / "out", "wb") as out:
        job = subprocess.Popen([SCRIPT, *command], env=environment, stdout=out, stderr=out)
    said = lambda: (tmp_path / "out").read_text()[-3000:]  # noqa: E731
    try:
        deadline = time.monotonic() + 240
        while not list((run / "checkpoints").glob("step-*")):
            assert job.poll() is None, said()
            assert time.monotonic() < deadline, said()
            time.sleep(0.5)
        started = [*psutil.Process(job.pid).children(recursive=True)]
        token = next((tmp_path / "secrets").rglob("token")).read_text()
        assert not any(token in " ".join(process.cmdline()) for process in started if process.is_running())
        assert (tmp_path / "mode").read_text() == "600\n"
        assert "--dashboard-host=127.0.0.1" in (tmp_path / "ray").read_text()
        os.kill(job.pid, signal.SIGTERM)
        job.wait(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 130, said()
    assert token not in (tmp_path / "out").read_text()
    assert not list((tmp_path / "secrets").rglob("*"))
    _, alive = psutil.wait_procs(started, timeout=30)
    assert [process.name() for process in alive] == []
