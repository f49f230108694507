"""A run's settings as text: as config.yaml has them, with the values in use beside what it leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dngd.report.run_files import RunFiles
from dngd.report.text import NOTHING

OPEN = {None: "default", "auto": "auto", "full": "full"}
"""Values that stand for others, and what is said of them before the one in use."""


def setting_names(runs: Sequence[RunFiles]) -> list[str]:
    """Return the names of all settings, and of what follows from them alone."""
    return list(dict.fromkeys(key for run in runs for key in (*run.config, *run.resolved)))


def setting(run: RunFiles, key: str) -> str:
    """Return a setting's value as YAML would show it, or `default (0.0031)` where it was left open; the dash for one
    that a run does not have."""
    if key not in run.config:
        return value_text(run.resolved[key]) if key in run.resolved else NOTHING
    value = run.config[key]
    if key in run.resolved and (value is None or isinstance(value, str)) and value in OPEN:
        in_use = run.resolved[key]
        return f"{OPEN[value]} ({'none' if in_use is None else value_text(in_use, short=True)})"
    return value_text(value)


def given_differently(runs: Sequence[RunFiles]) -> list[str]:
    """Return the names of the settings that the configurations do not share."""
    return [key for key in setting_names(runs) if len({_given(run, key) for run in runs}) > 1]


def differing(runs: Sequence[RunFiles]) -> list[str]:
    """Return the names of the settings that the runs do not share: what their configurations have, and what that stood
    for in the runs of which it is known."""
    given = set(given_differently(runs))
    in_use = {key: {setting(run, key) for run in runs if key in run.resolved} for key in setting_names(runs)}
    return [key for key, values in in_use.items() if key in given or len(values) > 1]


def _given(run: RunFiles, key: str) -> str:
    return value_text(run.config[key]) if key in run.config else NOTHING


def value_text(value: Any, *, short: bool = False) -> str:
    """Return a value as YAML would show it. short: numbers with four digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and value:
        texts = {str(name): value_text(item, short=short) for name, item in value.items()}
        return ", ".join(dict.fromkeys(texts.values())) if len(set(texts.values())) == 1 else _pairs(texts)
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "[]"
    return f"{value:.4g}" if short and isinstance(value, float) else str(value)


def _pairs(texts: dict[str, str]) -> str:
    return ", ".join(f"{name}: {text}" for name, text in texts.items())
