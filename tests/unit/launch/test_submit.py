"""dngd submit against a stand-in for a cluster's job server: what is sent, what comes back, what each failure says."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
import ray

from dngd import cli
from dngd.launch import follow as follow_module
from dngd.launch import submit as submit_module
from tests.helpers.job_server import JobServer, job_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    """A job server without authentication, and limits short enough for tests."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(submit_module, "CONNECT_SECONDS", 5.0)
    monkeypatch.setattr(submit_module, "AGENT_SECONDS", 0.2)
    monkeypatch.setattr(follow_module, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(follow_module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(follow_module, "CONTACT_SECONDS", 0.3)
    with job_server() as running:
        yield running


def submit(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["submit", *arguments])
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def once_followed(server: JobServer, action: Callable[[], object]) -> None:
    """Do something a moment after the log is being followed."""

    def wait() -> None:
        deadline = time.monotonic() + 30
        while not server.log_sent and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        action()

    threading.Thread(target=wait, daemon=True).start()


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence that a mistake ends with, and nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("dngd: ") and not line.startswith("dngd: note:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_the_command_reaches_the_cluster_and_its_log_the_user(
    server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FROM_HERE", "kept")
    server.log = ["epoch 1\n", "epoch 2\n", "done\n"]
    command = ["train", "--dataset", "a b", "--run-dir", "/shared/run", "--epochs", "2"]
    options = ["--env", "KEY=a=b", "--env", "FROM_HERE", "--submission-id", "mine"]
    assert submit("--address", server.address, *options, "--", *command) == 0
    out, err = capsys.readouterr()
    assert out == "epoch 1\nepoch 2\ndone\n"
    assert "job mine succeeded" in err
    [sent] = server.submitted
    assert shlex.split(sent["entrypoint"]) == ["dngd", *command]
    assert sent["submission_id"] == "mine"
    variables = sent["runtime_env"]["env_vars"]
    assert variables["KEY"] == "a=b"
    assert variables["FROM_HERE"] == "kept"
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT", "stopping must let a run end as Ctrl-C does"
    assert "working_dir" not in sent["runtime_env"]


@pytest.mark.parametrize("before", [["--", "dngd"], ["dngd"], []])
def test_other_ways_to_write_the_command(server: JobServer, before: list[str]) -> None:
    assert submit("--address", server.address.removeprefix("http://"), *before, "doctor", "--json") == 0
    assert server.submitted[0]["entrypoint"] == "dngd doctor --json"


def test_packages_run_in_the_python_that_has_them(server: JobServer, tmp_path: Path) -> None:
    assert submit("--address", server.address, "--pip", "ogb>=1.3.6", "--pip", "x==1", "--", "doctor") == 0
    assert server.submitted[0]["entrypoint"] == "python -m dngd.cli doctor"
    assert server.submitted[0]["runtime_env"]["pip"]["packages"] == ["ogb>=1.3.6", "x==1"]
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("y==2\n")
    assert submit("--address", server.address, "--pip", str(requirements), "--", "doctor") == 0
    assert server.submitted[1]["runtime_env"]["pip"]["packages"] == ["y==2"]


def test_the_working_directory_goes_along(server: JobServer, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("dataset: cora\n")
    assert submit("--address", server.address, "--working-dir", str(tmp_path), "--", "doctor") == 0
    [(name, content)] = server.packages.items()
    assert server.submitted[0]["runtime_env"]["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(content)) as package:
        assert package.namelist() == ["my.yaml"]


@pytest.mark.parametrize(
    ("status", "exit_code", "expected", "said"),
    [
        ("SUCCEEDED", 0, 0, "succeeded"),
        ("FAILED", 1, 1, "failed with exit code 1"),
        ("FAILED", 2, 2, "failed with exit code 2"),
        ("FAILED", 130, 130, "failed with exit code 130"),
        ("FAILED", -9, 137, "failed with exit code -9"),
        ("FAILED", 127, 2, "no dngd on the cluster"),
        ("FAILED", None, 1, "did not run to its end (the node died)"),
        ("STOPPED", None, 130, "was stopped"),
    ],
)
def test_the_jobs_exit_code_is_returned(
    server: JobServer,
    capsys: pytest.CaptureFixture[str],
    status: str,
    exit_code: int | None,
    expected: int,
    said: str,
) -> None:
    server.status, server.exit_code, server.message = status, exit_code, "the node died"
    assert submit("--address", server.address, "--", "doctor") == expected
    assert said in capsys.readouterr().err


def test_no_wait_prints_the_id_alone(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--address", server.address, "--no-wait", "--", "doctor") == 0
    out, err = capsys.readouterr()
    assert out == "raysubmit_1\n"
    assert f"ray job logs --address {server.address} --follow raysubmit_1" in err
    assert server.connections == 0


def test_a_broken_connection_loses_and_repeats_nothing(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.log = [f"line {number}\n" for number in range(9)]
    server.break_after = [2, 5, 5, 0]
    assert submit("--address", server.address, "--", "doctor") == 0
    assert capsys.readouterr().out == "".join(server.log)
    assert server.connections == 5


@pytest.mark.timeout(60)
def test_a_log_that_does_not_end_with_its_job(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The follower asks for the status when the log is silent."""
    server.log, server.ends, server.log_stays_open = ["one\n"], False, True
    once_followed(server, lambda: server.stopped.append("elsewhere"))
    assert submit("--address", server.address, "--", "doctor") == 130
    assert capsys.readouterr().out == "one\n"


def test_lost_contact_ends_the_following_with_a_sentence(
    server: JobServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.log, server.ends = ["one\n"], False
    once_followed(server, lambda: setattr(server, "refuse", (502, "gone")))
    assert submit("--address", server.address, "--submission-id", "mine", "--", "doctor") == 1
    out, err = capsys.readouterr()
    assert out == "one\n"
    last = err.splitlines()[-1]
    assert "no contact with the cluster" in last
    assert "the job may go on" in last
    assert "--follow mine" in last


def test_ctrl_c_without_a_terminal_leaves_the_job(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.ends = False
    once_followed(server, press_ctrl_c)
    assert submit("--address", server.address, "--submission-id", "mine", "--", "doctor") == 130
    err = capsys.readouterr().err
    assert "job mine goes on" in err
    assert f"ray job stop --address {server.address} mine" in err
    assert not server.stopped
    assert "--resume" not in err, "nothing of this machine was interrupted"


@pytest.mark.parametrize(
    ("answers", "stopped", "said"),
    [
        (["what?\n", "s\n"], ["mine"], "was stopped"),
        (["leave\n"], [], "goes on"),
        ([""], [], "goes on"),
    ],
)
def test_ctrl_c_on_a_terminal_asks(
    server: JobServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answers: list[str],
    stopped: list[str],
    said: str,
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answers.pop(0)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    server.ends = False
    once_followed(server, press_ctrl_c)
    assert submit("--address", server.address, "--submission-id", "mine", "--", "doctor") == 130
    assert server.stopped == stopped
    err = capsys.readouterr().err
    assert f"job mine {said}" in err
    assert answers == []


@pytest.mark.timeout(60)
def test_a_job_that_does_not_stop(
    server: JobServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dngd.cli.submit._ask", lambda: "stop")
    monkeypatch.setattr("dngd.cli.submit.STOP_SECONDS", 1.0)
    server.ends, server.stops = False, False
    once_followed(server, press_ctrl_c)
    assert submit("--address", server.address, "--submission-id", "mine", "--", "doctor") == 1
    assert server.stopped == ["mine"]
    assert "job mine has not ended 1 s after it was told to stop" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_then_continue(
    server: JobServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dngd.cli.submit._ask", lambda: setattr(server, "ends", True) or "continue")
    server.ends, server.log = False, ["one\n", "two\n"]
    once_followed(server, press_ctrl_c)
    assert submit("--address", server.address, "--", "doctor") == 0
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--"], "nothing to submit"),
        (["--", "python", "x.py"], "'python' after -- is none of dngd's commands"),
        (["--", "submit", "--", "train"], "'submit' after --"),
        (["--", "trian"], "'trian' after --"),
        (["--working-dir", "nowhere", "--", "doctor"], "--working-dir nowhere does not exist"),
        (["--working-dir", __file__, "--", "doctor"], "neither a folder nor a zip file"),
        (["--env", "1X=secret", "--", "doctor"], "--env wants KEY=VALUE"),
        (["--env", "DNGD_NOT_SET_ANYWHERE", "--", "doctor"], "DNGD_NOT_SET_ANYWHERE is not set"),
        (["--pip", "nowhere.txt", "--", "doctor"], "--pip nowhere.txt does not exist"),
        (["--pip", "nowhere.txt", "--pip", "x", "--", "doctor"], "--pip was given 2 times"),
        (["--submission-id", "a b", "--", "doctor"], "--submission-id 'a b'"),
        (["--address", "ray://host:10001", "--", "doctor"], "http://HOST:8265"),
        (["--address", "http://host:port", "--", "doctor"], "http://HOST:8265"),
        (["--address", "http://[::1", "--", "doctor"], "'http://[::1' is no address of a job server"),
        (["--address", "[::1", "--", "doctor"], "'[::1' is no address of a job server"),
        (["--address", "http://user:secret@[::1", "--", "doctor"], "credentials before an @"),
        (["--address", "http://user:secret@host:1", "--", "doctor"], "credentials before an @"),
        (["--adress", "x", "--", "doctor"], "--adress"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    server: JobServer, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    given = arguments if "--address" in arguments else ["--address", server.address, *arguments]
    assert submit(*given) == 2
    found = sentence(capsys)
    assert said in found
    assert "secret" not in found
    assert not server.submitted


def test_no_address(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--", "doctor") == 2
    assert "give --address http://HOST:8265" in sentence(capsys)


def test_the_given_address_wins_over_the_environment(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert submit("--address", server.address, "--", "doctor") == 0
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    monkeypatch.setenv("RAY_ADDRESS", server.address)
    assert submit("--", "doctor") == 0
    assert len(server.submitted) == 2


def test_nothing_answers(
    server: JobServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit("--address", "http://127.0.0.1:1", "--", "doctor") == 2
    assert "no Ray job server answers at http://127.0.0.1:1" in sentence(capsys)
    monkeypatch.setattr(submit_module, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert submit("--address", f"http://127.0.0.1:{silent.getsockname()[1]}", "--", "doctor") == 2
        assert time.monotonic() - started < 10, "the limit holds"
    assert "within 1 s" in sentence(capsys)


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        ((401, "Unauthorized: Missing authentication token"), "asks for a token"),
        ((403, "Forbidden: Invalid authentication token"), "refused this process's token"),
        ((404, "no such page"), "is no Ray job server"),
        ((200, "<html>hello</html>"), "is no Ray job server"),
    ],
)
def test_the_server_refuses(
    server: JobServer, capsys: pytest.CaptureFixture[str], refuse: tuple[int, str], said: str
) -> None:
    server.refuse = refuse
    assert submit("--address", server.address, "--", "doctor") == 2
    assert said in sentence(capsys)


@pytest.mark.parametrize("version", ["1.8.0", "1.13.0", "2.54.1", "3.0.0"])
def test_a_ray_that_dngd_does_not_run_on(server: JobServer, capsys: pytest.CaptureFixture[str], version: str) -> None:
    server.ray_version = version
    assert submit("--address", server.address, "--", "doctor") == 2
    found = sentence(capsys)
    assert f"runs Ray {version} but dngd needs 2.55 or newer" in found
    assert f"ray=={ray.__version__}" in found


def test_another_ray_that_dngd_runs_on_is_remarked(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.ray_version = "2.55.1"
    assert submit("--address", server.address, "--", "doctor") == 0
    assert f"note: the cluster runs Ray 2.55.1, this is {ray.__version__}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((500, "Traceback ...\nValueError: Job with submission_id mine already exists."), "has a job mine already"),
        ((500, "No available agent to submit job, please try again later."), "no node that starts jobs"),
        ((400, "Traceback ...\nTypeError: bad env {'KEY': 'hunter2000'}"), "refused the job (TypeError: bad env"),
    ],
)
def test_the_cluster_refuses_the_job(
    server: JobServer, capsys: pytest.CaptureFixture[str], refusal: tuple[int, str], said: str
) -> None:
    server.refuse_submission = refusal
    options = ["--submission-id", "mine", "--env", "KEY=hunter2000"]
    assert submit("--address", server.address, *options, "--", "doctor") == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1]
    assert "hunter2000" not in err


def test_values_of_variables_are_in_no_message(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.status, server.exit_code, server.error_type = "FAILED", None, "RUNTIME_ENV_SETUP_FAILURE"
    server.message = (
        "Failed to set up.\nTraceback ...\nOSError: cannot install for {'env_vars': {'KEY': 'hunter2000'}}\n"
    )
    assert submit("--address", server.address, "--env", "KEY=hunter2000", "--", "doctor") == 2
    err = capsys.readouterr().err
    assert "got no runtime environment (OSError: cannot install" in err, "the cause, not the traceback's beginning"
    assert "hunter2000" not in err


WRITERS: dict[str, Callable[[str], str]] = {
    "plain": lambda secret: secret,
    "python": lambda secret: str({"KEY": secret}),
    "python, another value with quotes": lambda secret: str([secret + "\"'"]),
    "json": lambda secret: json.dumps({"KEY": secret}),
    "json, unicode": lambda secret: json.dumps({"KEY": secret}, ensure_ascii=False),
    "json within json": lambda secret: json.dumps({"error": json.dumps({"KEY": secret})}),
    "json within python": lambda secret: repr([json.dumps({"KEY": secret})]),
    "url": lambda secret: "http://host/?key=" + quote(secret),
    "url, all quoted": lambda secret: "http://host/?key=" + quote(secret, safe=""),
    "form": lambda secret: urlencode({"key": secret}),
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize(
    "secret",
    [
        'pass"word',
        r"pass\word",
        "-----BEGIN-----\nMIIEow+/=\n-----END-----\n",
        'it\'s "both"',
        "tab\tother",
        "ünï/cödé+=?",
    ],
)
def test_a_secret_is_found_however_it_is_written(how: str, secret: str) -> None:
    said = f"cannot install for {WRITERS[how](secret)} here"
    left = submit_module.redact(said, [secret, "1"])
    assert left.startswith("cannot install for ")
    assert left.endswith(" here")
    assert left.count("***") >= 1
    for part in re.findall(r"\w{4,}", secret):
        assert part not in left
        assert quote(part) not in left


def test_a_message_that_is_cut_within_a_secret_of_several_lines() -> None:
    key = "-----BEGIN-----\nMIIEowIBAAKCAQEA\nq7rX2n0b\n-----END-----"
    assert "MIIE" not in submit_module.redact("OSError: -----BEGIN-----\nMIIEowIBAAKCAQEA", [key])
    assert submit_module.redact("yes: 1 of 21 nodes", ["1", "yes"]) == "yes: 1 of 21 nodes", "words stay whole"


@pytest.mark.parametrize(
    ("command", "noted"),
    [
        (["train", "--dataset", "cora"], True),
        (["train", "--dataset", "cora", "--run-dir", "/shared/x"], False),
        (["train", "--dataset", "cora", "--set", "run_dir=/shared/x"], False),
        (["train", "--dataset", "cora", "--dry-run"], False),
        (["doctor"], False),
    ],
)
def test_a_run_folder_that_nobody_will_find_is_remarked(
    server: JobServer, capsys: pytest.CaptureFixture[str], command: list[str], noted: bool
) -> None:
    assert submit("--address", server.address, "--", *command) == 0
    assert ("note: without --run-dir" in capsys.readouterr().err) is noted
