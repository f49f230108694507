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
