"""Deliberate mistakes, applied one at a time, that a law must be seen to catch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest


@contextlib.contextmanager
def mutant(target: Any, attribute: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute while the block runs."""
    with mock.patch.object(target, attribute, replacement):
        yield


def assert_caught(law: Callable[[], None], target: Any, attribute: str, replacement: Any) -> None:
    """Assert that a law holds, and that it fails under the mutant."""
    law()
    with mutant(target, attribute, replacement), pytest.raises(AssertionError):
        law()
