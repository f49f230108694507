"""Text of a page: escaping, and numbers as people read them."""

from __future__ import annotations

import html
import math
import re

NOTHING = "–"
"""Shown for a value that is not there."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def escape(text: object) -> str:
    """Return text that is safe in HTML content and quoted attributes; characters HTML forbids become �."""
    return html.escape(_CONTROL.sub("\ufffd", str(text)), quote=True)


def number(value: float | None, digits: int = 3) -> str:
    """Return about `digits` significant digits, thousands set apart: 0.0123, 4.56, 12,345; or NaN, ∞."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def integer(value: float | None) -> str:
    """Return a count with its thousands set apart."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:,.0f}"


def since_last_start(after: float, last: float) -> str:
    """Return which steps of a resumed run were measured: those after one, to the last."""
    return f"of steps {integer(after + 1)} to {integer(last)}, since the last start"


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a share of 1 as a percentage: 0.8927 -> 89.27%."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{100 * value:.{decimals}f}%"


def duration(value: float | None) -> str:
    """Return seconds as 4.56 s, 12 min 5 s or 3 h 20 min."""
    if value is None or not math.isfinite(value) or value < 120:
        return f"{number(value)} s" if value is not None else NOTHING
    seconds = round(value)
    if seconds < 7200:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60} min"


def milliseconds(value: float | None) -> str:
    """Return 4.56 ms."""
    return NOTHING if value is None else f"{number(value)} ms"


def byte_size(value: float | None) -> str:
    """Return 512 B, 1.5 KiB, 23.4 MiB, ..."""
    if value is None or not math.isfinite(value):
        return number(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{number(value)} {unit}"


METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "roc_auc": "ROC-AUC",
    "average_precision": "average precision",
}
"""Metrics of a run, in words; all of them are shares of 1. One's own is called what its function is."""


def metric_words(metric: str) -> str:
    """Return a metric in words."""
    return METRICS.get(metric, metric.replace("_", " "))


def metric_value(metric: str, value: float | None, decimals: int = 2) -> str:
    """Return a metric's value: a percentage, of one's own, which may be no share, a number."""
    return percent(value, decimals) if metric in METRICS else number(value, decimals + 2)


def capitalised(words: str) -> str:
    """Return words as a title begins."""
    return words[:1].upper() + words[1:]


def tick(value: float) -> str:
    """Return an axis label, exact and short: 0.05, 250, 12k, 3M."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.6g}{unit}"
    return f"{value:.6g}"
