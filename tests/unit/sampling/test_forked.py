"""The fork server and its copies: how they start, how their ends are told, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dngd.errors import TrainingError
from dngd.sampling import SamplerPipeline, forked
from dngd.sampling.process import child_environment
from tests.unit.sampling.graphs import digest, make_pipeline, take

ROOT = Path(__file__).parents[3]
# Without the imports, which the copies can do without here, and with other tasks than sampling.
QUICK = """
import sys
from dngd.sampling import fork_server, worker
fork_server._import_what_samplers_need = lambda: None
fork_server.IDLE_SECONDS = {idle}
{serve}
worker.leave(fork_server.main(sys.argv[1:]))
"""
ECHO = """
def serve(requests, replies, files, parent):
    word = requests.recv(100)
    replies.sendall(word)
    return len(word)
worker.serve = serve
"""


def quick(idle: float = 60.0, serve: str = ECHO) -> list[str]:
    return [sys.executable, "-c", QUICK.format(idle=idle, serve=serve)]


@pytest.fixture
def server_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The command that servers are started with; those of other tests are not used."""
    command = {"is": quick()}
    monkeypatch.setattr(forked, "_servers", {})
    monkeypatch.setattr(forked, "_command", lambda: command["is"])
    yield command
    for server in forked._servers.values():
        server._finalizer()


class Child:
    """A process from the server, and this side's ends of its streams."""

    def __init__(self) -> None:
        self.requests, requests = socket.socketpair()
        self.replies, replies = socket.socketpair()
        self.replies.settimeout(30.0)
        log = os.memfd_create("log")
        try:
            fds = (requests.fileno(), replies.fileno(), log)
            self.process = forked.start_forked(fds, child_environment())
            self.log = os.dup(log)
        finally:
            requests.close()
            replies.close()
            os.close(log)

    def close(self) -> None:
        for end in (self.requests, self.replies):
            end.close()
        os.close(self.log)


@pytest.fixture
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        child.close()


def ended(pid: int, within_seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_each_has_its_own_streams_and_the_code_it_ends_with_is_told(
    server_command: dict[str, Any], children: list[Child]
) -> None:
    children += [Child(), Child(), Child()]
    pids = [child.process.pid(30.0) for child in children]
    assert len(set(pids)) == 3
    assert len(forked._servers) == 1
    (server,) = forked._servers.values()
    assert {os.getsid(pid) for pid in pids if pid} == {server._process.pid}  # not this terminal's
    # The second ends though the others, who were forked before and after it, go on: nobody else holds its stream.
    children[1].requests.shutdown(socket.SHUT_WR)
    assert children[1].process.wait(10.0) == 0
    assert children[1].replies.recv(10) == b""
    for child, word in ((children[0], b"ab"), (children[2], b"abc")):
        child.requests.sendall(word)
        assert child.replies.recv(10) == word
        assert child.process.wait(10.0) == len(word)
    assert server._running == {}


def test_a_killed_one_is_told_by_its_signal_and_what_it_wrote_is_in_its_log(
    server_command: dict[str, Any], children: list[Child]
) -> None:
    server_command["is"] = quick(serve="def serve(*_):\n    raise KeyError('nothing there')\nworker.serve = serve")
    children.append(Child())
    assert children[0].process.wait(30.0) == 1
    assert "KeyError: 'nothing there'" in os.pread(children[0].log, 9999, 0).decode()

    forked._servers.clear()
    server_command["is"] = quick()
    children.append(Child())
    with pytest.raises(TimeoutError):
        children[1].process.wait(0.0)
    assert children[1].process.pid(30.0) is not None
    children[1].process.kill()
    assert children[1].process.wait(10.0) == -signal.SIGKILL
    children[1].process.kill()  # of one that has ended: nothing


def test_what_the_server_ends_with_is_told_of_all_and_the_next_has_a_new_one(
    server_command: dict[str, Any], children: list[Child]
) -> None:
    server_command["is"] = quick(
        serve="import time\nworker.serve = lambda r, s, f, parent: worker._leave_with_parent(parent)"
    )
    children += [Child(), Child()]
    pids = [child.process.pid(30.0) for child in children]
    (server,) = forked._servers.values()
    assert pids[0] is not None
    os.kill(pids[0], signal.SIGSTOP)  # one that would not see it by itself
    server._process.kill()
    for child in children:
        assert child.process.wait(10.0) is None
        assert "forked from was killed by SIGKILL (out of memory, perhaps)," in child.process.failure
    assert all(pid is not None and ended(pid) for pid in pids)
    server_command["is"] = quick()
    children.append(Child())
    children[2].requests.sendall(b"x")
    assert children[2].replies.recv(10) == b"x"


def test_a_fork_that_the_machine_refuses_is_told(server_command: dict[str, Any], children: list[Child]) -> None:
    refuse = "import os\ndef fork():\n    raise BlockingIOError(11, 'no more processes')\nos.fork = fork"
    server_command["is"] = quick(serve=refuse)
    children.append(Child())
    assert children[0].process.wait(30.0) is None
    assert children[0].process.failure == "could not be forked ([Errno 11] no more processes)"
    assert children[0].process.pid(0.0) is None


def test_an_idle_server_ends_and_the_next_process_has_another(
    server_command: dict[str, Any], children: list[Child]
) -> None:
    server_command["is"] = quick(idle=0.1)
    children.append(Child())
    (first,) = forked._servers.values()
    assert children[0].process.pid(30.0) is not None
    time.sleep(0.5)
    assert first._process.poll() is None  # it has a process, and so is not idle
    children[0].requests.sendall(b"x")
    assert children[0].process.wait(10.0) == 1
    assert first._process.wait(10.0) == 0
    children.append(Child())
    children[1].requests.sendall(b"xy")
    assert children[1].process.wait(30.0) == 2
    assert first not in forked._servers.values()


def test_requests_on_their_way_to_a_server_that_ends_are_served(tmp_path: Path) -> None:
    """The server looks once more after it has closed its ear; what comes later is refused at once."""
    late = """
import os, socket
class Control(socket.socket):
    def shutdown(self, how):
        open(os.environ["HERE"], "w").close()
        while not os.path.exists(os.environ["LATE"]):  # the requests are sent in between
            pass
        super().shutdown(how)
socket.socket = Control
"""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.settimeout(30.0)
    streams = [(socket.socketpair(), socket.socketpair()) for _ in range(3)]
    here, go_on = tmp_path / "here", tmp_path / "late"
    server = subprocess.Popen(
        [*quick(idle=0.0, serve=late + ECHO), str(theirs.fileno()), str(os.getpid())],
        pass_fds=(theirs.fileno(),),
        env=child_environment() | {"HERE": str(here), "LATE": str(go_on)},
        cwd=ROOT,
    )
    try:
        theirs.close()
        assert appears(here)
        for number, ((_, requests), (_, replies)) in enumerate(streams):
            fds = (requests.fileno(), replies.fileno(), 2)
            socket.send_fds(control, [json.dumps({"fork": list(fds), "number": number}).encode()], fds)
            requests.close()
            replies.close()
        go_on.touch()
        pids = [json.loads(socket.recv_fds(control, 999, 1)[0]) for _ in streams]
        assert [told["number"] for told in pids] == [0, 1, 2]
        with pytest.raises(BrokenPipeError):
            control.send(b"{}")
        for (requests, _), (replies, _) in streams:
            requests.sendall(b"late")
            replies.settimeout(30.0)
            assert replies.recv(10) == b"late"
        ends = [json.loads(control.recv(999)) for _ in streams]
        assert sorted(told["ended"] for told in ends) == sorted(told["pid"] for told in pids)
        assert {told["code"] for told in ends} == {4}
        assert server.wait(10.0) == 0
    finally:
        server.kill()
        server.wait()
        control.close()
        for pair in (end for both in streams for end in both):
            pair[0].close()


def appears(file: Path, within_seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + within_seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return file.exists()


def test_a_trainer_with_many_open_files_samples(server_command: dict[str, Any], children: list[Child]) -> None:
    """The control socket keeps its number in the server, and select() takes none above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        children.append(Child())
        children[0].requests.sendall(b"x")
        assert children[0].replies.recv(10) == b"x"
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_request_that_ctrl_c_cut_off_shifts_no_answers(
    server_command: dict[str, Any], children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = socket.send_fds

    def cut_off(*arguments: Any) -> int:
        send(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(forked.socket, "send_fds", cut_off)
    with pytest.raises(KeyboardInterrupt):
        Child()
    monkeypatch.setattr(forked.socket, "send_fds", send)
    children += [Child(), Child()]
    for child, word in zip(children, (b"ab", b"abc")):
        child.requests.sendall(word)
        assert child.replies.recv(10) == word
        assert child.process.wait(10.0) == len(word)
    (server,) = forked._servers.values()
    assert (server._starting, server._running) == ({}, {})


def test_a_server_whose_trainer_ended_while_it_imported_ends() -> None:
    """Also where another process holds the control socket, so that there is no end of it."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with control, theirs:
        nobody = subprocess.Popen([sys.executable, "-c", ""])
        nobody.wait()
        server = subprocess.Popen(
            [*quick(), str(theirs.fileno()), str(nobody.pid)],
            pass_fds=(theirs.fileno(),),
            env=child_environment(),
            cwd=ROOT,
        )
        assert server.wait(30.0) == 0


def test_files_that_the_server_cannot_open_are_told(server_command: dict[str, Any], children: list[Child]) -> None:
    few = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))"
    server_command["is"] = quick(serve=few)
    children.append(Child())
    assert children[0].process.wait(30.0) is None
    assert "could not be forked (only " in children[0].process.failure


def test_files_that_are_too_many_on_their_way_are_sent_later(
    server_command: dict[str, Any], children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [OSError(errno.ETOOMANYREFS, "too many"), OSError(errno.ETOOMANYREFS, "too many")]
    send = socket.send_fds

    def refusing(*arguments: Any) -> int:
        if refusals:
            raise refusals.pop()
        return send(*arguments)

    monkeypatch.setattr(forked.socket, "send_fds", refusing)
    children.append(Child())
    children[0].requests.sendall(b"x")
    assert children[0].replies.recv(10) == b"x"
    assert refusals == []
    monkeypatch.setattr(forked, "IN_FLIGHT_SECONDS", 0.0)
    monkeypatch.setattr(forked.socket, "send_fds", lambda *_: (_ for _ in ()).throw(OSError(errno.ETOOMANYREFS, "no")))
    with pytest.raises(TrainingError, match="sampler process 0 cannot be started"):
        make_pipeline(1)


def becomes_idle(batches: SamplerPipeline, deadline: float) -> bool:
    while not batches.is_idle and time.monotonic() < deadline:
        time.sleep(0.01)
    return batches.is_idle


def take_until(batches: SamplerPipeline, deadline: float) -> None:
    while time.monotonic() < deadline:
        take(batches, 9)


FORKING = """
import os, sys
from tests.unit.sampling.graphs import digest, make_pipeline, take
from dngd.sampling import forked
with make_pipeline(2) as batches:
    expected = digest(take(batches, 6))
    pid = os.fork()
    if pid == 0:
        assert not forked._servers
        with make_pipeline(2) as mine:
            ok = digest(take(mine, 6)) == expected and len(forked._servers) == 1
        sys.exit(7 if ok else 1)  # with all that runs at an exit, and at the end of the parent's with
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    take(batches, 6)  # this one's go on
(server,) = forked._servers.values()
print(server._process.pid)
"""


@pytest.mark.slow
def test_a_copy_of_the_trainer_has_a_server_of_its_own_and_none_outlives_its_trainer() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKING], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ended(int(done.stdout))


def test_samplers_of_one_server_give_the_batches_of_another() -> None:
    with make_pipeline(2) as first:
        before = digest(take(first, 8))
    (server,) = [server for server in forked._servers.values() if not server.is_lost]
    with make_pipeline(2) as second:
        assert digest(take(second, 8)) == before
        assert {Path(f"/proc/{pid}/stat").read_text().split()[3] for pid in second.pids} == {str(server._process.pid)}
        deadline = time.monotonic() + 30.0
        assert becomes_idle(second, deadline)
        for pid in second.pids:
            os.kill(pid, signal.SIGSTOP)
        take(second, 1)  # was drawn, and another is asked for
        assert not becomes_idle(second, time.monotonic() + 0.3)
        for pid in second.pids:
            os.kill(pid, signal.SIGCONT)
        assert becomes_idle(second, deadline)
        assert second.has_next
        server._process.kill()
        with pytest.raises(TrainingError, match="forked from was killed by SIGKILL"):
            take_until(second, deadline)
    assert all(ended(pid) for pid in second.pids)
