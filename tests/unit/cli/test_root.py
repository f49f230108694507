"""What errors become at the command line's root: one sentence, an exit code, no traceback."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dngd import cli
from dngd.cli import root


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return exit code and standard error of the command line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    return int(exit_info.value.code or 0), capsys.readouterr().err


def raising(error: BaseException) -> Any:
    def command(*_: object, **__: object) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--dataset", "DATA", "--engine", "local", "--quiet", "--run-dir", "LONG"),
        ("train", "--dataset", "LONG/x", "--engine", "local", "--quiet"),
        ("evaluate", "LONG"),
        ("report", "LONG"),
        ("report", "RUN", "--out", "LONG"),
        ("predict", "RUN", "--out", "LONG"),
        ("export", "RUN", "--out", "LONG"),
        ("data", "import", "LONG", "--out", "new"),
        ("data", "info", "LONG"),
        ("bench", "comm", "--out", "LONG"),
    ],
    ids=" ".join,
)
def test_a_path_that_is_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    words = {"RUN": "run", "LONG": "x" * 300, "LONG/x": "x" * 300 + "/x", "DATA": "products-mini"}
    code, said = ended(capsys, *(words.get(word, word) for word in arguments))
    assert code == 2, said
    assert said.startswith("dngd: ")
    assert said.count("\n") == 1, said
    assert "x" * 300 in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("number", sorted(root.PATH_FIXES), ids=errno.errorcode.get)
def test_a_path_that_cannot_be_used_is_named_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    reason = os.strerror(number)
    monkeypatch.setattr(root, "app", raising(OSError(number, reason, "/private/run")))
    assert ended(capsys) == (2, f"dngd: /private/run: {reason}; {root.PATH_FIXES[number]}\n")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "/x"), OSError(errno.EACCES, "no path")])
def test_other_errors_are_not_the_users(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    monkeypatch.setattr(root, "app", raising(error))
    with pytest.raises(OSError, match=str(error.strerror)):
        cli.main([])


@pytest.mark.parametrize("arguments", [["--version"], ["doctor", "--json"]], ids=" ".join)
def test_a_full_disk_behind_standard_output(arguments: list[str]) -> None:
    """Printed by rich, which flushes, or written and flushed in the end."""
    command = [sys.executable, "-m", "dngd.cli", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "dngd: output cannot be written: No space left on device; free space, or send it elsewhere\n"


def test_a_reader_that_ended_is_told_nothing() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "dngd.cli", "--version"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["report", "run"], "dngd.report.read_runs"),
        (["predict", "run", "--out", "p"], "dngd.train.predict.predict_run"),
        (["evaluate", "run"], "dngd.train.evaluate_run.evaluate_run"),
        (["train", "--dataset", "cora"], "dngd.launch.Trainer.fit"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_ctrl_c_speaks_of_resuming_where_there_is_something_to_resume(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    where: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, raising(KeyboardInterrupt()))
    code, said = ended(capsys, *arguments)
    assert code == 130
    assert said.splitlines()[-1].startswith("dngd: interrupted")
    assert ("--resume" in said) is (arguments[0] == "train")


INTERRUPTING = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Interrupting(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == MODULE:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
sys.argv = ["dngd", "--help"]
"""


@pytest.mark.parametrize("module", ["dngd.cli.root", "dngd.config", "typer", "rich.console"])
@pytest.mark.parametrize(
    "start",
    [
        "from dngd.cli import main; main()",
        "runpy.run_module('dngd', run_name='__main__')",
        "runpy.run_module('dngd.cli', run_name='__main__')",
    ],
    ids=["script", "dngd", "dngd.cli"],
)
def test_ctrl_c_while_modules_are_imported(start: str, module: str) -> None:
    program = f"MODULE = {module!r}\n{INTERRUPTING}\n{start}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "dngd: interrupted before it began\n")


def test_the_installed_script_is_what_was_tested() -> None:
    project = (Path(root.__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\ndngd = "dngd.cli:main"\n' in project


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("data", "import", "--help"), ("doctor",)])
def test_a_terminal_that_has_not_every_character(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], encoding: str
) -> None:
    """What it has not is a question mark, and the rest is what it would be."""
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding=encoding, errors="strict"))
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*arguments])
    assert exit_info.value.code in (0, 1)
    sys.stdout.flush()
    printed = bytes_out.getvalue()
    assert (b"Train" if "train" in arguments else b"") in printed
    assert len(printed) > 200


@pytest.mark.parametrize(("errors", "shown"), [("strict", b"?"), ("surrogateescape", b"\xff")])
def test_names_beyond_the_encoding_are_printed(monkeypatch: pytest.MonkeyPatch, errors: str, shown: bytes) -> None:
    """In the C locale as the bytes that they are."""
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding="utf-8", errors=errors))
    monkeypatch.setattr(root, "app", lambda **_: sys.stdout.write("graph \udcff of λ\n"))
    with pytest.raises(SystemExit):
        cli.main([])
    assert bytes_out.getvalue() == b"graph " + shown + " of λ\n".encode()


def test_a_report_never_replaces_what_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "notes.md").write_text("how I use dngd")
    for command in (["report", "run", "--out", "notes.md"], ["bench", "accuracy", "--report", "notes.md"]):
        code, said = ended(capsys, *command)
        assert (code, said) == (2, f"dngd: {command[-2]} notes.md exists and is no dngd report; give another path\n")
    for _ in range(2):
        assert ended(capsys, "report", "run")[0] == 0
    assert (tmp_path / "notes.md").read_text() == "how I use dngd"


@pytest.mark.parametrize(
    ("arguments", "lists"),
    [
        (("train", "--datset", "cora"), "dngd train --help"),
        (("train", "--epochs", "soon"), "dngd train --help"),
        (("report",), "dngd report --help"),
        (("evaluate", "run", "more"), "dngd evaluate --help"),
        (("data", "info"), "dngd data info --help"),
        (("data", "imprt"), "dngd data --help"),
        (("bench", "step", "--stps", "3"), "dngd bench step --help"),
        (("trian",), "dngd --help"),
        (("--verbos", "train"), "dngd --help"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_complaint_leads_to_the_commands_own_help(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], lists: str
) -> None:
    code, said = ended(capsys, *arguments)
    assert code == 2
    assert said.startswith("dngd: ")
    assert said.endswith(f" (see {lists})\n")
    assert said.count("\n") == 1
    assert ended(capsys, *lists.split()[1:])[0] == 0, "what it leads to is there"
