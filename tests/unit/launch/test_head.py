"""What a head is asked before `ray.init`, against a stand-in for it."""

from __future__ import annotations

import platform
import socket
import sys
from typing import Any

import grpc
import pytest
import ray

from dngd.config import RayConfig
from dngd.errors import UserError
from dngd.launch import cluster, head
from dngd.launch.head import Head, ask_head, asks_for_token
from tests.helpers.head_server import head_server

RAY, PYTHON = ray.__version__, platform.python_version()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: "")  # whatever ran on this machine before


class Failing(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "busy"


def test_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "NO_GRPC_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with head_server(RAY, PYTHON) as address:
        assert ask_head(address) == Head(RAY, PYTHON)
        assert asks_for_token(address) is False


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:²", "ray://localhost:" + "9" * 20])
def test_what_is_no_address_of_a_head(address: str) -> None:
    with pytest.raises(UserError, match=r"is not HOST:PORT or ray://HOST:PORT; give e\.g\. 10\.0\.0\.1:6379"):
        ask_head(address)


def test_whether_a_token_is_asked_for() -> None:
    with head_server(RAY, PYTHON, token="0" * 64) as address:
        assert asks_for_token(address) is True


def test_a_head_that_cannot_be_asked_tells_nothing_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def request(*_: object, **__: object) -> bytes:
        raise Failing(grpc.StatusCode.UNAVAILABLE)

    monkeypatch.setattr(head, "_request", request)
    assert asks_for_token("127.0.0.1:1") is None


@pytest.mark.parametrize("module", ["ray._private.grpc_utils", "ray.core.generated"])
def test_a_ray_without_these_private_parts_has_the_word_itself(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    with head_server("2.40.0", PYTHON) as address:
        monkeypatch.setitem(sys.modules, module, None)
        assert ask_head(address) is None
        assert asks_for_token(address) is None


def test_versions_are_left_to_a_ray_that_compares_them_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"runs Ray 2\.40\.0"):
        head.check_versions("here", Head("2.40.0", PYTHON))
    monkeypatch.delattr("ray._private.utils.check_version_info")
    head.check_versions("here", Head("2.40.0", PYTHON))


@pytest.mark.parametrize("metadata", [b"", b"{}"])
def test_an_empty_answer_is_no_other_version(monkeypatch: pytest.MonkeyPatch, metadata: bytes) -> None:
    monkeypatch.setattr(head, "_request", lambda *_, **__: metadata)
    with head_server(RAY, PYTHON) as address:
        assert ask_head(address) is None


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_busy_head_is_asked_again(monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode) -> None:
    monkeypatch.setattr(head, "RETRY_SECONDS", 0.01)
    asked: list[int] = []
    request = head._request

    def busy(*arguments: Any, **options: Any) -> bytes:
        asked.append(1)
        if len(asked) < 3:
            raise Failing(code)
        return request(*arguments, **options)

    monkeypatch.setattr(head, "_request", busy)
    with head_server(RAY, PYTHON) as address:
        assert ask_head(address) == Head(RAY, PYTHON)
    assert len(asked) == 3


def test_a_client_server_that_never_answers_is_not_waited_for_by_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LIMIT_SECONDS", 0.5)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("it would try for half a minute, and warn"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"ray://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"what listens at {address} did not answer within .*10001"):
            cluster.connect(RayConfig(address=address), environment={})


def test_a_client_server_that_answers_is_left_to_ray() -> None:
    with head_server(RAY, PYTHON) as address:
        assert ask_head(f"ray://{address}") is None


def test_a_head_that_never_answers_is_not_called_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing."""
    monkeypatch.setattr(head, "LIMIT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match=f"what listens at {address} did not answer within 1 s"):
            ask_head(address)


def test_a_dashboards_address_is_for_submit() -> None:
    with pytest.raises(UserError, match=r"http:// address is for dngd submit.*HOST:6379 or ray://"):
        cluster.connect(RayConfig(address="http://10.0.0.1:8265"), environment={})


def test_an_empty_variable_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    given: list[Any] = []
    monkeypatch.setattr(ray, "init", lambda address, **_: given.append(address))
    assert cluster.connect(RayConfig(), environment={})
    assert given == [None]


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError])
def test_a_local_cluster_that_fails_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(**_: object) -> None:
        raise kind("could not connect\nto GCS")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError, match=r"on this machine \(could not connect\); if `ray status`"):
        cluster.connect(RayConfig(), environment={})


def test_a_killed_cluster_of_this_machine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's note of it stays; a local cluster is started in its place."""
    asked: list[str | None] = []
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda address, **_: asked.append(address))
    with socket.create_server(("127.0.0.1", 0)) as server:
        note = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: note)
        assert head.noted_but_gone() is None
        cluster.connect(RayConfig(), environment={})
    assert head.noted_but_gone() == note
    cluster.connect(RayConfig(), environment={})
    for nothing in ("", "no address"):
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda nothing=nothing: nothing)
        assert head.noted_but_gone() == (nothing or None)
    assert asked == [None, "local"]
