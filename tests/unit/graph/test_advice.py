"""The system is told how features are read: what it noted down of a mapping says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dngd.graph import GraphStore, advice


def vm_flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that an address lies in; "rr" is random reads."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            found = begin <= address < end
        elif found and first == "VmFlags:":
            return line.split()[1:]
    pytest.skip("this system does not tell the flags of a mapping")


def test_only_the_features_of_this_opening_are_advised(store: GraphStore) -> None:
    advised, other = GraphStore.open(store.path), GraphStore.open(store.path)
    assert advice.read_randomly(advised.features)
    first, last = advised.features[0].data_ptr(), advised.features[-1, -1:].data_ptr()
    assert "rr" in vm_flags(first)
    assert "rr" in vm_flags(last)
    assert "rr" not in vm_flags(advised.indices.data_ptr())
    assert "rr" not in vm_flags(other.features.data_ptr())
    assert torch.equal(advised.features, other.features)


def test_where_there_is_nothing_to_advise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not advice.read_randomly(torch.empty(0, 3))

    def no_library(name: object, use_errno: bool) -> object:
        raise OSError("none")

    monkeypatch.setattr(advice.ctypes, "CDLL", no_library)
    assert not advice.read_randomly(torch.ones(3))
