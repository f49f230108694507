"""A local S3 server, and what lies in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "testing-id",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass
class ObjectStore:
    """bucket: its name. endpoint: host and port. client: boto3's."""

    bucket: str
    endpoint: str
    client: Any
    server: Any

    def upload(self, folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.client.upload_file(str(file), self.bucket, f"{prefix}/{file.relative_to(folder)}")

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the objects, without the empty ones that stand for folders."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(o["Key"] for page in pages for o in page.get("Contents", []) if not o["Key"].endswith("/"))

    def read(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def write(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens while the block runs; what is stored stays."""
        port = int(self.endpoint.rpartition(":")[2])
        self.server.stop()
        try:
            yield
        finally:
            self.server = _server(port)


def _server(port: int) -> Any:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    module = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'dngd[dev]'")
    server = module.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server


@contextmanager
def object_store(bucket: str) -> Iterator[ObjectStore]:
    """Serve one bucket, to this process and its children through Amazon's variables, while the block runs."""
    server = _server(0)
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import boto3

        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket=bucket)
        store = ObjectStore(bucket, f"{host}:{port}", client, server)
        yield store
    store.server.stop()
