"""Run folders as the training code leaves them, and a reader that judges a page."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

LOADING = {
    "script",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "image",
    "use",
    "base",
    "form",
    "video",
    "audio",
}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def record(step: int, accuracy: float, loss: float = 1.0) -> dict[str, float]:
    return {
        "epoch": step / 10,
        "step": step,
        "train_loss": loss,
        "val_loss": loss + 0.1,
        "val_accuracy": accuracy,
        "test_accuracy": accuracy - 0.01,
        "train_seconds": step * 0.5,
    }


def result(steps: int = 30) -> dict[str, Any]:
    return {
        "best_val_accuracy": 0.8125,
        "test_accuracy": 0.8025,
        "train_seconds": 15.0,
        "seconds_to_best_val": 15.0,
        "steps": steps,
        "epochs": 3.0,
        "world_size": 2,
        "seeds_per_second": 4321.0,
        "step_ms": {"mean": 10.0, "p50": 9.0, "p99": 20.0},
        "phase_ms": {
            "forward": 3.0,
            "backward": 2.0,
            "optimizer": 4.0,
            "checkpoint": 0.5,
            "optimizer.commit": 1.0,
            "optimizer.refresh": 1.5,
        },
        "bytes": {"gradient": 4096, "factor": 2048, "inverse": 1024},
        "peak_rss_bytes": 3 * 1024**3,
        "peak_gpu_bytes": 0,
        "dropped_steps": 0,
        "machine": {"cpu": "a processor", "cpus": "2", "torch threads": "1"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "run_dir": "run",
    }


def health(steps: tuple[int, ...] = (10, 20, 30)) -> list[dict[str, Any]]:
    """Factor health of two layers; the first evaluation of the second comes before its first inverse."""
    measures = {"a_condition": 30.0, "g_condition": 3.0, "a_damping_share": 0.75, "g_damping_share": 0.5}
    measures |= {"scale": 0.25, "escalations": 2.0, "failed_inversions": 1.0, "reused_inversions": 0.0}
    measures |= {"dropped_steps": 0.0, "non_finite_statistics": 4.0}
    unknown = dict.fromkeys(("a_condition", "g_condition", "a_damping_share", "g_damping_share"))
    return [
        {
            "step": step,
            "layers": {
                "layers.0": measures | {"staleness": float(step % 7)},
                "layers.1": measures | ({"staleness": -1.0} | unknown if step == 10 else {"staleness": 5.0}),
            },
        }
        for step in steps
    ]


def write_run(
    path: Path,
    *,
    config: dict[str, Any] | None = None,
    records: list[dict[str, float]] | None = None,
    outcome: dict[str, Any] | None = None,
    health: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a finished run of three evaluations where nothing else is given; outcome {}: no result.json."""
    path.mkdir(parents=True)
    config = {"dataset": "cora", "model": "gcn", "kfac": {"damping": 0.01}} | (config or {})
    records = [record(10, 0.5), record(20, 0.75), record(30, 0.8125)] if records is None else records
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    if health is not None:
        (path / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in health))
    outcome = result() if outcome is None else outcome
    if outcome:
        (path / "result.json").write_text(json.dumps(outcome))
    return path


class Page(HTMLParser):
    """A page's tags, attributes and text; every tag must be closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.markup = markup
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, css: str = "") -> list[dict[str, str]]:
        wanted = set(css.split())
        named = [attrs for name, attrs in self.tags if name == tag]
        return [attrs for attrs in named if wanted <= set(attrs.get("class", "").split())]

    def check_self_contained(self) -> None:
        """Nothing that runs or loads, from anywhere; only numbers inside the charts."""
        assert not {tag for tag, _ in self.tags} & LOADING
        for tag, attrs in self.tags:
            assert not {"src", "href", "xlink:href", "action", "style"} & set(attrs), (tag, attrs)
            assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
            for name in ("d", "x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height"):
                assert "nan" not in attrs.get(name, ""), (tag, attrs)
                assert "inf" not in attrs.get(name, ""), (tag, attrs)
                if name != "d" and tag != "meta" and name in attrs:
                    assert math.isfinite(float(attrs[name])), (tag, attrs)
            for pair in attrs.get("points", "").split():
                assert all(math.isfinite(float(part)) for part in pair.split(",")), (tag, attrs)
        for forbidden in ("http:", "https:", "url(", "@import", "javascript:"):
            assert forbidden not in self.markup, forbidden
