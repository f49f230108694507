"""Seeding a step's random draws."""

from __future__ import annotations

import traceback

import pytest
import torch

from dngd.train.streams import seed_generators


def test_draws_are_those_of_torchs_manual_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2**63)
    expected = torch.randn(5), torch.bernoulli(torch.full((40,), 0.5)), torch.randperm(9)
    monkeypatch.setattr(traceback, "format_stack", lambda *args: pytest.fail("as slow as torch.manual_seed"))
    seed_generators(2**63, torch.device("cpu"))
    drawn = torch.randn(5), torch.bernoulli(torch.full((40,), 0.5)), torch.randperm(9)
    assert all(torch.equal(one, other) for one, other in zip(expected, drawn))


def test_a_seed_is_that_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.manual_seed's: a module of one's own may draw on several."""
    generators = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: len(generators))
    monkeypatch.setattr(torch.cuda.random, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", generators, raising=False)
    with torch.random.fork_rng(devices=[]):
        seed_generators(7, torch.device("cuda", 1))
    assert [generator.initial_seed() for generator in generators] == [7, 7]
