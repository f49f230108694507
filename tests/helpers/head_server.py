"""A stand-in for a cluster's head: what it says of its versions, and whether it takes whoever asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc


class _Keys(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):  # type: ignore[misc]
    def __init__(self, metadata: dict[str, str], token: str | None) -> None:
        self._metadata, self._token = metadata, token

    def InternalKVGet(self, request: Any, context: Any) -> Any:
        if self._token is not None and f"Bearer {self._token}" not in dict(context.invocation_metadata()).values():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: Authentication token is missing")
        return gcs_service_pb2.InternalKVGetReply(value=json.dumps(self._metadata).encode())


@contextmanager
def head_server(ray_version: str, python_version: str, token: str | None = None) -> Iterator[str]:
    """Serve on a free port while the block runs, and give the address. token: what it asks for."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    metadata = {"ray_version": ray_version, "python_version": python_version}
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(_Keys(metadata, token), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)
