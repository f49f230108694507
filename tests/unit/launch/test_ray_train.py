"""What a worker makes of what the driver sends."""

from __future__ import annotations

from pathlib import Path

import pytest

import dngd
from dngd.launch.ray_train import _with_data_root


@pytest.mark.parametrize(
    ("own", "given", "found"),
    [
        (None, None, "/of/driver"),
        ("/of/node", None, "/of/node"),
        ("relative", None, "/of/driver"),
        ("~/of/node", None, "/of/driver"),
        ("/of/node", "/of/run", "/of/run"),
    ],
)
def test_a_worker_takes_the_drivers_data_sets_unless_its_node_has_some(
    monkeypatch: pytest.MonkeyPatch, own: str | None, given: str | None, found: str
) -> None:
    """own: the node's $DNGD_DATA_ROOT; a relative one is nothing in a worker's working directory."""
    monkeypatch.delenv("DNGD_DATA_ROOT", raising=False)
    if own is not None:
        monkeypatch.setenv("DNGD_DATA_ROOT", own)
    config = dngd.TrainConfig(dataset="cora", data_root=None if given is None else Path(given))
    assert _with_data_root(config, "/of/driver").data_root_in_use == Path(found)


def test_a_driver_without_data_sets_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DNGD_DATA_ROOT", raising=False)
    config = dngd.TrainConfig(dataset="products-mini")
    assert _with_data_root(config, None) == config
