"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dngd.graph import GraphStore
from tests.helpers.graphs import small_store
from tests.helpers.ray_cluster import Cluster, ray_cluster


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the shared Ray cluster."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted stores of the tests go to a folder of their own, not to the user's cache."""
    path = tmp_path_factory.mktemp("cache")
    before = os.environ.get("DNGD_CACHE_DIR")
    os.environ["DNGD_CACHE_DIR"] = str(path)
    yield path
    if before is None:
        del os.environ["DNGD_CACHE_DIR"]
    else:
        os.environ["DNGD_CACHE_DIR"] = before


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches tests and their children, also where a shell started the tests behind it and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: many small tensors, on a busy machine, spend their time waiting for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A graph of 600 nodes, 5 classes."""
    return small_store(tmp_path_factory.mktemp("stores") / "small")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of public graphs; tests that need it skip without it."""
    value = os.environ.get("DNGD_DATA_ROOT")
    if not value or not Path(value).is_dir():
        pytest.skip("DNGD_DATA_ROOT names no folder of public graphs")
    return Path(value)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One Ray cluster for all tests, token authentication on."""
    with ray_cluster() as running:
        yield running
