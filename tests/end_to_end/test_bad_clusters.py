"""Clusters and stores that cannot be used: one sentence with the fix, quickly, exit code 2, whichever command asks."""

from __future__ import annotations

import http.server
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from dngd import cli
from dngd.graph import GraphStore
from dngd.launch import cluster_check
from tests.helpers.head_server import head_server
from tests.helpers.job_server import JobServer, job_server
from tests.helpers.object_store import VARIABLES
from tests.helpers.ray_cluster import Cluster

RAY, PYTHON = ray.__version__, platform.python_version()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the sentence with which the command line refuses, within 25 s."""
    began = time.monotonic()
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    err = capsys.readouterr().err
    assert exit_info.value.code == 2, err
    assert time.monotonic() - began < 25
    assert "Traceback" not in err
    [sentence] = [line for line in err.splitlines() if line.startswith("dngd: ")]
    return sentence


def train(store: GraphStore, run: Path, *more: str) -> list[str]:
    size = ["--num-layers", "2", "--fanout", "5,5", "--batch-size", "20", "--num-workers", "1", "--quiet"]
    return ["train", "--dataset", str(store.path), *size, "--run-dir", str(run), *more]


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize(
    ("versions", "said"),
    [
        (("2.40.0", PYTHON), f"runs Ray 2.40.0 and Python {PYTHON} but this process Ray {RAY}"),
        ((RAY, "3.9.1"), f"runs Ray {RAY} and Python 3.9.1 but this process"),
    ],
)
def test_other_versions(
    store: GraphStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    versions: tuple[str, str],
    said: str,
) -> None:
    with head_server(*versions) as address:
        arguments = train(store, tmp_path / "r") if command == "train" else ["doctor"]
        sentence = refused(capsys, *arguments, "--address", address)
    assert said in sentence
    assert "install those here, or send the command as a job" in sentence
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_head_that_asks_for_a_token(
    store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with head_server(RAY, PYTHON, token="0" * 64) as address:
        arguments = train(store, tmp_path / "r") if command == "train" else ["doctor"]
        sentence = refused(capsys, *arguments, "--address", address)
    assert f"the cluster at {address} asks for a token and this process has none to send" in sentence
    assert "~/.ray/auth_token" in sentence


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_the_dashboards_port_in_place_of_the_heads(
    store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with job_server() as server:
        arguments = train(store, tmp_path / "r") if command == "train" else ["doctor"]
        address = server.address.removeprefix("http://")
        sentence = refused(capsys, *arguments, "--address", address)
    assert f"what answers at {address} is no Ray head" in sentence
    assert "not that of its dashboard" in sentence


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_doctor_where_nobody_listens(capsys: pytest.CaptureFixture[str], scheme: str) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{listening.getsockname()[1]}"
    sentence = refused(capsys, "doctor", "--address", address)
    assert f"answers at {address}" in sentence


def test_doctor_of_a_dashboard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that are alive, their resources together, another Ray that runs, and that anyone may ask."""
    with job_server() as server:
        server.ray_version = "2.59.0"
        resources = {"CPU": 4.0, "GPU": 1.0, "memory": 2.0**33}
        server.nodes = [
            {"state": "ALIVE", "resources_total": resources},
            {"state": "ALIVE", "resources_total": resources},
            {"state": "DEAD", "resources_total": {}},
        ]
        found = {line.name: line for line in cluster_check.check_cluster(server.address)}
    assert found["nodes"].found == "2"
    assert found["their resources"].found == "8 CPUs, 2 GPUs, 16.0 GiB for Ray's workers"
    assert found["cluster's Ray"].found == "2.59.0"
    assert f"this is {RAY}" in found["cluster's Ray"].fix
    assert found["token authentication"].found == "off"
    assert "RAY_AUTH_MODE=token" in found["token authentication"].fix


def test_doctor_of_a_dashboard_without_nodes(server_without_nodes: JobServer) -> None:
    found = {line.name: line for line in cluster_check.check_cluster(server_without_nodes.address)}
    assert (found["nodes"].found, found["nodes"].works) == ("0", False)


@pytest.fixture
def server_without_nodes() -> Iterator[JobServer]:
    with job_server() as server:
        yield server


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_doctor_of_a_real_cluster(cluster: Cluster) -> None:
    """By its head, with a look at its nodes, and by its dashboard; with another token neither."""
    for address in (cluster.gcs_address, cluster.jobs_address):
        command = [sys.executable, "-m", "dngd.cli", "doctor", "--address", address]
        done = subprocess.run(
            [*command, "--json"], env=cluster.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = {line["name"]: line for line in json.loads(done.stdout)["findings"]}
        assert found["token authentication"]["found"] == "on"
        assert found["nodes"]["found"] == "1"
        assert found["their resources"]["found"].startswith("4 CPUs, 0 GPUs")
        assert RAY in found["cluster's Ray"]["found"]
        if address == cluster.gcs_address:
            assert "dngd 0.1.0" in found[f"node {os.uname().nodename}"]["found"]
        wrong = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
        done = subprocess.run(command, env=wrong, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert "refused this process's token" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


class _Forbidding(http.server.BaseHTTPRequestHandler):
    """An object store that lets nobody do what `forbidden` says."""

    forbidden = ("GET", "HEAD", "PUT", "POST", "DELETE")

    def _answer(self) -> None:
        status = 403 if self.command in self.forbidden else 404 if self.command == "HEAD" else 200
        error = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        body = error if status == 403 else listing
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *arguments: object) -> None:
        return None


@pytest.fixture
def forbidding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield
    server.shutdown()


def test_no_permission_to_read_a_bucket(
    forbidding: None, store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = ["--engine", "local", "--batch-size", "20"]
    sentence = refused(capsys, "train", "--dataset", "s3://graphs/small", *local, "--run-dir", str(tmp_path / "r"))
    assert "s3://graphs/small/manifest.json may not be read with the credentials in use; set AWS_" in sentence
    sentence = refused(capsys, "train", "--dataset", str(store.path), *local, "--run-dir", "s3://runs/one")
    assert "s3://runs/one" in sentence
    assert "may not be read with the credentials in use; set AWS_" in sentence
    assert "testing-secret" not in sentence
    sentence = refused(capsys, "evaluate", "s3://runs/one")
    assert "may not be read with the credentials in use" in sentence


def test_no_permission_to_write_a_bucket(
    forbidding: None,
    store: GraphStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Forbidding, "forbidden", ("PUT", "POST", "DELETE"))
    arguments = ["--engine", "local", "--batch-size", "20", "--run-dir", "s3://runs/one"]
    sentence = refused(capsys, "train", "--dataset", str(store.path), *arguments)
    assert "may not be written with the credentials in use; set AWS_" in sentence


def test_a_full_disk_on_the_node_that_stages(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore
) -> None:
    """Little room: told before a byte is copied, with the node's name."""
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 16384))
    arguments = train(store, tmp_path / "r", "--engine", "local", "--stage-dir", str(small_disk / "stage"))
    sentence = refused(capsys, *arguments)
    assert f"{small_disk / 'stage'} on {os.uname().nodename} has" in sentence
    assert "free some space there, or choose another folder by --stage-dir" in sentence
