"""What the head of a Ray cluster says when asked directly, before `ray.init`, which tries for a minute and longer.

One gRPC request tells apart what `ray.init` does not: nobody there, something else there, a token that is missing or
wrong, and another version of Ray or Python. It uses private parts of Ray; without them `ray.init` has the word.
"""

from __future__ import annotations

import json
import platform
import re
import socket
import time
from dataclasses import dataclass

import ray
from ray.exceptions import AuthenticationError

from dngd.errors import UserError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 5.0
LIMIT_SECONDS = 10.0
RETRY_SECONDS = 0.5
NOTED_SECONDS = 3.0

PRIVATE_GONE = (ImportError, AttributeError)
"""What is raised where a version of Ray has its private parts elsewhere."""

OTHER_PROTOCOL = ("http1.x server", "HTTP/1", "settings frame")
"""What gRPC's details hold where something else than gRPC listens."""

TOKEN_FIX = (
    "set RAY_AUTH_MODE=token and put the cluster's token in ~/.ray/auth_token or a file that RAY_AUTH_TOKEN_PATH names"
)


@dataclass(frozen=True)
class Head:
    """The versions that a cluster was started with."""

    ray_version: str
    python_version: str


def ask_head(address: str) -> Head | None:
    """Return what the head at HOST:PORT says; None for an address of another kind (auto, local, ray://HOST:PORT),
    and where its versions cannot be told.

    Raises UserError, within 20 s, if nothing answers there, it is no Ray head, or it refuses this process's token.
    """
    if address in ("auto", "local"):
        return None
    if address.startswith(("http://", "https://")):
        raise UserError(
            "an http:// address is for dngd submit, which sends a job to a dashboard; give the head's here, HOST:6379 "
            "or ray://HOST:10001"
        )
    host_port = address.removeprefix("ray://")
    host, colon, port = host_port.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port):
        raise UserError(f"Ray address {address!r} is not HOST:PORT or ray://HOST:PORT; give e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or leave the address "
            "out to use a local one"
        ) from None
    if address != host_port:
        _wait_for_client_server(address)
        return None
    try:
        metadata = json.loads(_metadata(address) or b"{}")
    except PRIVATE_GONE:
        return None
    if not {"ray_version", "python_version"} <= metadata.keys():
        return None  # of a head that only starts, say
    return Head(metadata["ray_version"], metadata["python_version"])


def noted_but_gone() -> str | None:
    """Return the address that Ray noted as this machine's running cluster, if nobody listens there any more.

    A cluster that was killed leaves its note, and `ray.init` without an address tries it for minutes.
    """
    try:
        from ray._private.utils import read_ray_address

        address = read_ray_address()
    except PRIVATE_GONE:
        return None
    if not address:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=NOTED_SECONDS).close()
    except (OSError, ValueError):
        return str(address)
    return None


def check_versions(address: str, head: Head) -> None:
    """Raise UserError if a driver of this process's Ray and Python cannot join the cluster."""
    found = {"ray_version": head.ray_version, "python_version": head.python_version}
    try:
        from ray._private.utils import check_version_info

        check_version_info(found, "here")
    except PRIVATE_GONE:
        return
    except RuntimeError:
        raise UserError(
            f"the cluster at {address} runs Ray {head.ray_version} and Python {head.python_version} but this process "
            f"Ray {ray.__version__} and Python {platform.python_version()}, and they must be the same; install those "
            "here, or send the command as a job, dngd submit --address http://HEAD:8265 -- ..."
        ) from None


def token_sentence(address: str, said: str) -> str:
    """Return the sentence for a refusal over tokens. said: what Ray says of it."""
    if any(words in said for words in ("Forbidden", "token is invalid", "InvalidAuthToken")):
        return f"the cluster at {address} refused this process's token; {TOKEN_FIX}"
    if "RAY_AUTH_TOKEN_PATH is set but" in said:
        return f"RAY_AUTH_TOKEN_PATH names no readable file with a token; {TOKEN_FIX}"
    return f"the cluster at {address} asks for a token and this process has none to send; {TOKEN_FIX}"


def asks_for_token(address: str) -> bool | None:
    """Say whether the head at HOST:PORT refuses who sends no token; None if that cannot be told."""
    try:
        import grpc

        try:
            _request(address, ANSWER_SECONDS, with_token=False)
        except grpc.RpcError as error:
            return True if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
    except PRIVATE_GONE:
        return None
    return False


def _wait_for_client_server(address: str) -> None:
    """Return once gRPC answers at ray://HOST:PORT: `ray.init` tries for half a minute, and then warns. Raises UserError
    if none does; of a token `ray.init` has the word."""
    try:
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
        from ray.util.client.common import GRPC_OPTIONS

        with init_grpc_channel(address.removeprefix("ray://"), options=GRPC_OPTIONS) as channel:
            grpc.channel_ready_future(channel).result(timeout=LIMIT_SECONDS)
    except (*PRIVATE_GONE, AuthenticationError):
        return
    except grpc.FutureTimeoutError:
        raise UserError(
            f"what listens at {address} did not answer within {LIMIT_SECONDS:.0f} s as a Ray client server does; check "
            "the port, 10001 unless the head was started with another, or give the head's HOST:6379 on its own network"
        ) from None


def _metadata(address: str) -> bytes:
    """Return what the cluster keeps of how it was started; empty where that cannot be asked. Raises UserError."""
    import grpc

    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        try:
            return _request(address, min(ANSWER_SECONDS, max(0.1, deadline - time.monotonic())), with_token=True)
        except AuthenticationError as error:
            raise UserError(token_sentence(address, str(error))) from None
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(token_sentence(address, "InvalidAuthToken" if _sends_token() else "")) from None
            may_pass = code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
            if not may_pass or any(words in str(error.details()) for words in OTHER_PROTOCOL):
                raise UserError(
                    f"what answers at {address} is no Ray head ({code.name.lower()}); give the address that "
                    "`ray start --head` prints, HOST:6379, not that of its dashboard"
                ) from None
            if time.monotonic() + RETRY_SECONDS >= deadline:
                raise UserError(
                    f"what listens at {address} did not answer within {LIMIT_SECONDS:.0f} s ({code.name.lower()}); try "
                    "again when the head is less busy, and check that it is the address that `ray start --head` prints"
                ) from None
        time.sleep(RETRY_SECONDS)


def _sends_token() -> bool:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def _request(address: str, timeout: float, *, with_token: bool) -> bytes:
    """Return the answer to one request. Raises grpc.RpcError, and PRIVATE_GONE if another Ray has it elsewhere."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    open_channel = init_grpc_channel if with_token else grpc.insecure_channel
    with open_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray's own
        stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        request = gcs_service_pb2.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
        return bytes(stub.InternalKVGet(request, timeout=timeout).value)
