"""What the head of a Ray cluster says when asked directly, before `ray.init`, which tries for a minute and longer.

One gRPC request tells apart what `ray.init` does not: nobody there, something else there, a token that is missing or
wrong, and another version of Ray or Python.
"""

from __future__ import annotations

import json
import platform
import socket
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.grpc_utils import init_grpc_channel
from ray._private.utils import check_version_info
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from dngd.errors import UserError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 5.0

TOKEN_FIX = (
    "set RAY_AUTH_MODE=token and put the cluster's token in ~/.ray/auth_token or a file that RAY_AUTH_TOKEN_PATH names"
)


@dataclass(frozen=True)
class Head:
    """The versions that a cluster was started with, and whether it asks for a token."""

    ray_version: str
    python_version: str
    asks_for_token: bool


def ask_head(address: str) -> Head | None:
    """Return what the head at HOST:PORT says; None for an address of another kind (auto, local, ray://HOST:PORT).

    Raises UserError, within 20 s, if nothing answers there, it is no Ray head, or it refuses this process's token.
    """
    if address in ("auto", "local"):
        return None
    host_port = address.removeprefix("ray://")
    host, colon, port = host_port.rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"Ray address {address!r} is not HOST:PORT or ray://HOST:PORT; give e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or leave the address "
            "out to use a local one"
        ) from None
    if address != host_port:
        return None
    metadata = json.loads(_metadata(address) or b"{}")
    return Head(metadata.get("ray_version", "?"), metadata.get("python_version", "?"), _asks_for_token(address))


def check_versions(address: str, head: Head) -> None:
    """Raise UserError if a driver of this process's Ray and Python cannot join the cluster."""
    found = {"ray_version": head.ray_version, "python_version": head.python_version}
    try:
        check_version_info(found, "here")
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


def _metadata(address: str) -> bytes:
    try:
        with init_grpc_channel(address) as channel:
            return _key_value(channel)
    except AuthenticationError as error:
        raise UserError(token_sentence(address, str(error))) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(token_sentence(address, "InvalidAuthToken" if is_token_auth_enabled() else "")) from None
        raise UserError(
            f"what answers at {address} is no Ray head ({error.code().name.lower()}); give the address that "
            "`ray start --head` prints, HOST:6379, not that of its dashboard"
        ) from None


def _asks_for_token(address: str) -> bool:
    try:
        with grpc.insecure_channel(address) as channel:
            _key_value(channel)
    except grpc.RpcError as error:
        return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _key_value(channel: Any) -> bytes:
    """Return what the cluster keeps of how it was started."""
    stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
    request = gcs_service_pb2.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
    return bytes(stub.InternalKVGet(request, timeout=ANSWER_SECONDS).value)
