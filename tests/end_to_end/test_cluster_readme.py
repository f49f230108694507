"""Every command of cluster/README.md, the manifests and the Slurm script: parsed, sent to a stand-in, planned."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from dngd import cli
from dngd.graph import GraphStore
from tests.helpers.job_server import JobServer, job_server

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster" / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
ADDRESS = "http://localhost:8265"


def commands(program: str) -> list[list[str]]:
    """Return the README's commands of a program, those that `sbatch` and `ray exec` hold included."""
    return [words for line in LINES if (words := shlex.split(line, comments=True)) and words[0] == program]


def slurm_examples() -> list[list[str]]:
    """Return what follows slurm.sh in the README and in the script's own comment."""
    script = (ROOT / "cluster" / "slurm.sh").read_text().split("# Everything ends")[0].replace("\\\n#", "")
    lines = [line.lstrip("# ") for line in script.splitlines() if line.lstrip("# ").startswith("sbatch")]
    found = [shlex.split(line) for line in lines] + commands("sbatch")
    return [words[words.index("cluster/slurm.sh") + 1 :] for words in found]


def entrypoints() -> list[list[str]]:
    found = []
    for path in sorted((ROOT / "cluster" / "kubernetes").glob("rayjob-*.yaml")):
        program, *arguments = shlex.split(yaml.safe_load(path.read_text())["spec"]["entrypoint"])
        assert program == "dngd"
        found.append(arguments)
    return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("AWS_PROFILE", "graphs")
    with job_server() as running:
        yield running


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 0, f"{shlex.join(arguments)}: {capsys.readouterr().err}"


def plan(arguments: list[str], store: GraphStore, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan a training on a small graph, with every option as it stands; --help of anything else."""
    if arguments[0] == "train":
        arguments = [argument.replace("/shared", str(shared)) for argument in arguments]
        run([*arguments, "--dataset", str(store.path), "--batch-size", "20", "--dry-run"], capsys)
    else:
        run([*arguments, "--help"], capsys)


def test_dngd_commands(
    server: JobServer,
    store: GraphStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = commands("dngd")
    assert len(found) >= 6
    for words in found:
        assert words[1] == "submit", "the README's dngd commands go to a cluster"
        monkeypatch.chdir(ROOT)
        run([word.replace(ADDRESS, server.address) for word in words[1:]], capsys)
        job = shlex.split(server.submitted[-1]["entrypoint"])
        program = ["dngd"] if job[0] == "dngd" else ["python", "-m", "dngd.cli"]
        assert job[: len(program)] == program
        if "--working-dir" in words:
            monkeypatch.chdir(ROOT / words[words.index("--working-dir") + 1])
        plan(job[len(program) :], store, tmp_path, capsys)
    assert len(server.submitted) == len(found)


def test_commands_that_others_start(store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted = [words[words.index("--") + 1 :] for words in commands("ray") if words[1:3] == ["job", "submit"]]
    assert submitted
    assert all(words[0] == "dngd" for words in submitted)
    held = [*entrypoints(), *slurm_examples(), *(words[1:] for words in submitted)]
    assert len(held) >= 5
    for arguments in held:
        plan(arguments, store, tmp_path, capsys)


def parse(group: click.Command, words: list[str]) -> None:
    """Parse a command of Ray as Ray does, without running it."""
    context = group.make_context(group.name, list(words), resilient_parsing=False)
    if isinstance(group, click.Group):
        name, command, rest = group.resolve_command(context, [*getattr(context, "_protected_args", []), *context.args])
        assert command is not None, name
        parse(command, rest)


def test_ray_commands_parse() -> None:
    found = commands("ray")
    assert len(found) >= 15
    for config in ("aws", "gcp"):
        loaded = yaml.safe_load((ROOT / "cluster" / f"{config}.yaml").read_text())
        lines = [*loaded["head_start_ray_commands"], *loaded["worker_start_ray_commands"]]
        found += [words for line in lines if (words := shlex.split(line))[0] == "ray"]
    for words in found:
        parse(ray_cli, words[1:])
    with pytest.raises(click.UsageError):
        parse(ray_cli, ["start", "--head", "--dashboard-hots=127.0.0.1"])


def test_shell_lines_parse_and_name_files_that_exist() -> None:
    done = subprocess.run(["bash", "-n"], input="\n".join(LINES), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    named = set(re.findall(r"cluster/[\w./-]+\w", "\n".join(LINES)))
    assert len(named) >= 8
    for path in named:
        assert (ROOT / path).is_file(), path
    table = README.split("**What was run")[0]
    for name in re.findall(r"`([\w./]+)`", table.split("| --- |")[1]):
        if "." in name and not name.startswith("constraints"):
            assert (ROOT / "cluster" / name).exists(), name
