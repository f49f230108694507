"""The pipeline benchmark: who takes part, that all do the same work, how they are compared. No times are asserted.

Contenders run in this process here, on its sampling thread (see dngd.sampling.inline); the slow test has real ones.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dngd.bench import PipelineOptions, pipeline, run_pipeline_bench
from dngd.bench.child import Message
from dngd.bench.contenders import KEEP_MEMORY, Contender, Entry, dgl_entries, own_entries
from dngd.bench.pipeline import check_same_work, compare, input_bound
from dngd.bench.progress import BenchProgress
from dngd.bench.tables import print_pipeline
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.sampling.inline import inline_sampling_is_canonical, submit_to_sampling_thread
from tests.helpers.mutants import assert_caught


def options(store: GraphStore, **changes: Any) -> PipelineOptions:
    config = TrainConfig(
        dataset=str(store.path), num_layers=2, hidden=8, fanout=(3, 3), batch_size=50, prefetch=1, engine="local"
    )
    fields: dict[str, Any] = {"rows": ("input",), "processes": (0,), "batches": 2, "rounds": 2, "steps": 2}
    return PipelineOptions(config, **(fields | {"threads": 1} | changes))


class Inside:
    """A Child whose contender runs in this process: DGL's on the sampling thread, which uses its generator anyway."""

    def __init__(self, name: str, setup: Message, log: list[tuple[str, Message]]) -> None:
        self.name = name
        self._log = log
        self._on_thread = setup["who"] != "dngd"
        self._contender = self._call(lambda: Contender(setup))

    def _call(self, function: Callable[[], Any]) -> Any:
        return submit_to_sampling_thread(function).result() if self._on_thread else function()

    def ask(self, request: Message) -> Message:
        self._log.append((self.name, request))
        answer: Message = self._call(lambda: self._contender.answer(request))
        return answer

    def resume(self) -> None:
        return None

    def pause(self) -> None:
        return None


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Message]]:
    asked: list[tuple[str, Message]] = []

    @contextlib.contextmanager
    def inside(
        setups: Mapping[str, tuple[Message, Mapping[str, str]]], progress: BenchProgress
    ) -> Iterator[dict[str, Any]]:
        yield {name: Inside(name, setup, asked) for name, (setup, _) in setups.items()}
        progress.advance(len(setups), "started")

    assert inline_sampling_is_canonical() in (True, False)  # the thread is the first to draw, if none was yet
    monkeypatch.setattr(pipeline, "stopped_children", inside)
    return asked


class Counting(BenchProgress):
    """Compares what is announced with what is done."""

    def __init__(self) -> None:
        self.announced = self.done = 0

    def begin(self, total: int, text: str) -> None:
        assert self.done == self.announced
        self.announced += total

    def advance(self, steps: int, text: str) -> None:
        self.done += steps


WAYS = ["dgl-prefetch:0", "dgl-index:0", "dgl-tuned:0", "dngd:0"]


def test_contenders_take_turns_on_the_same_work(store: GraphStore, log: list[tuple[str, Message]]) -> None:
    progress = Counting()
    result = run_pipeline_bench(options(store, rows=("training", "gcn", "input"), rounds=3), progress)
    assert progress.done == progress.announced > 0
    assert list(result["rows"]) == ["input", "gcn", "training"]
    assert result["machine"]["threads"] == result["turns"]["threads"] == 1
    for row in result["rows"].values():
        assert list(row["contenders"]) == WAYS
        sizes = [of["mean_sizes"] for of in row["contenders"].values()]
        for of in row["contenders"].values():
            assert (len(of["chunk_seconds"]), of["chunk_batches"]) == (3, 2)
            assert of["seeds_per_second"] == pytest.approx(50 / of["seconds_a_batch"])
        # Fanout 3, 3 with few nodes of lower degree: edges are nearly as many for all.
        assert max(s["edges"] for s in sizes) < 1.1 * min(s["edges"] for s in sizes)
        assert [(c["against"], c["processes"]) for c in row["comparison"]] == [
            ("dgl", 0),
            ("dgl", None),
            ("tuned", 0),
            ("tuned", None),
        ]
    assert {c["target"] for c in result["rows"]["input"]["comparison"]} == {5.0, 2.0}
    assert {c["target"] for c in result["rows"]["gcn"]["comparison"]} == {None}
    losses = [of["last_loss"] for of in result["rows"]["training"]["contenders"].values()]
    assert all(0 < loss < 20 for loss in losses)
    # Every round asks each once; what may be ready at the start is drained in the first.
    first, later = log[: len(WAYS)], log[len(WAYS) : 4 * len(WAYS)]
    assert {name: request["lead"] for name, request in first} == dict.fromkeys(WAYS, 1) | {"dngd:0": 2}
    assert all(request == {"lead": 1, "batches": 2} for _, request in later)
    assert [name for name, _ in later[:4]] == ["dgl-index:0", "dgl-tuned:0", "dngd:0", "dgl-prefetch:0"]


def test_a_16_bit_table_and_sampling_alone_take_part_but_are_not_compared(
    store: GraphStore, log: list[tuple[str, Message]], tmp_path: Path
) -> None:
    config = options(store).config.model_copy(update={"cache_dir": tmp_path})
    asked = options(store, rows=("input", "float16", "roofline"), rounds=1)
    asked = PipelineOptions(**{**vars(asked), "config": config})
    result = run_pipeline_bench(asked)
    row = result["rows"]["input"]
    assert list(row["contenders"]) == [*WAYS, "dngd-sampling:0", "dngd-float16:0"]
    assert {c["dngd"] for c in row["comparison"]} == {"dngd:0"}
    (half,) = (GraphStore.open(path) for path in tmp_path.iterdir() if path.is_dir())
    assert half.features.element_size() == 2
    assert half.num_edges == store.num_edges
    assert half.split("masks").train.equal(store.split("masks").train)
    roofline = result["rows"]["roofline"]
    assert roofline["feature_bytes_a_batch"]["fused"] < roofline["feature_bytes_a_batch"]["gathered"]
    assert min(roofline["bytes_per_second"].values()) > 0
    bound, contenders = roofline["bound"], result["rows"]["input"]["contenders"]
    assert bound["draw_seconds"] == contenders["dngd-sampling:0"]["seconds_a_batch"]
    assert set(bound["highest_ratio"]) == {name for name in contenders if name.startswith("dgl-")}


def test_the_table_says_what_was_found(store: GraphStore, log: list[tuple[str, Message]]) -> None:
    result = run_pipeline_bench(options(store, rounds=1))
    result["rows"] |= {
        "memory": {
            "steps": 2,
            "counts": [{"workers": 1, "processes": 2, **dict.fromkeys(MEMORY_PARTS, 5e6)}],
            "added": [
                {
                    "workers": 2,
                    "total": 9e8,
                    "beyond_model_and_buffers": 3e8,
                    "model_gradients_and_optimizer": 2e6,
                    "batch_buffers": 598e6,
                }
            ],
            "samplers": [{"samplers": 1, "total": 1.2e9}, {"samplers": 4, "total": 1.8e9}],
            "added_by_a_sampler": {"batch_slots": 1.28e8, "total": 2e8},
        },
        "open": {
            "store": {"bytes": 2e9, "warm_seconds": 0.004, "cold_seconds": 0.02, "cached_share_when_cold": 0.01},
        },
        "disk": {"not_allowed": "no group can be made"},
    }
    text = io.StringIO()
    print_pipeline(result, Console(width=100, file=text))
    for words in (
        "x[input_nodes]",
        "the seeds a second of DGL's example (dgl-",
        "target 5:",
        "Worker 2 added 900 MB, 300 MB of it beyond",
        "1 sampler process takes 1200 MB, with 4 1800 MB: 200 MB a sampler, 128 MB of it for",
        "GraphStore.open, store of 2,000 MB: 4.0 ms; with 1% of its files cached 20.0 ms.",
        "not allowed on this machine (no group can be made)",
    ):
        assert words in text.getvalue()


MEMORY_PARTS = ("graph", "batch_slots", "anonymous", "other_files", "total")


def contender(who: str, processes: int, seconds: float, **changes: Any) -> dict[str, Any]:
    fields = {"who": who, "work": "input", "processes": processes, "seconds_a_batch": seconds, "chunk_batches": 4}
    return fields | {"chunk_seconds": [4 * seconds, 8 * seconds]} | changes


def test_each_is_compared_with_the_fastest_peer_there() -> None:
    results = {
        "dgl-a:0": contender("dgl", 0, 0.6),
        "dgl-b:0": contender("dgl", 0, 0.5, chunk_seconds=[1.0, 4.0]),
        "dgl-a:1": contender("dgl", 1, 0.4),
        "dgl-tuned:0": contender("tuned", 0, 0.2),
        "dngd:0": contender("dngd", 0, 0.1),
        "dngd:1": contender("dngd", 1, 0.05),
        "dngd-sampling:0": contender("dngd", 0, 0.01, work="sampling"),
        "dngd-float16:0": contender("dngd", 0, 0.02),
    }
    found = {(of["against"], of["processes"]): of for of in compare(results, {"dgl": 5.0})}
    assert set(found) == {("dgl", 0), ("dgl", 1), ("dgl", None), ("tuned", 0), ("tuned", None)}
    at_none = found["dgl", 0]
    assert (at_none["dngd"], at_none["peer"]) == ("dngd:0", "dgl-b:0")
    assert at_none["ratio"] == pytest.approx(5.0)
    assert at_none["range"] == [pytest.approx(2.5), pytest.approx(5.0)]
    assert found["dgl", 1]["ratio"] == pytest.approx(8.0)
    assert (found["dgl", None]["dngd"], found["dgl", None]["peer"]) == ("dngd:1", "dgl-a:1")
    assert found["tuned", None]["ratio"] == pytest.approx(4.0)
    assert [found["dgl", 1]["reached"], found["tuned", 0]["reached"]] == [True, None]


def test_the_bound_keeps_all_cores_busy_and_no_draw_is_split() -> None:
    busy = input_bound(draw=0.04, rows=0.03, threads=2, input_seconds={"dgl-index:0": 0.2, "dngd:0": 0.06})
    assert busy["least_seconds_a_batch"] == pytest.approx((0.04 + 2 * 0.03) / 2)
    assert busy["highest_ratio"] == {"dgl-index:0": pytest.approx(4.0)}
    assert input_bound(0.04, 0.001, 8, {})["least_seconds_a_batch"] == 0.04


def test_work_that_differs_is_refused() -> None:
    """DGL's int32 trap: every degree looks right and input nodes are a tenth of what they should be."""
    sound = {"seeds": 10, "edges": 800, "first_layer_edges": 600, "first_layer_rows": 90}
    answers = {"dgl": [sound | {"input_nodes": 500}] * 2, "tuned": [sound | {"input_nodes": 510}] * 2, "own": [sound]}
    check_same_work(answers)
    trapped = answers | {"trapped": [sound | {"input_nodes": 60}] * 2}

    def law() -> None:
        with pytest.raises(TrainingError, match=r"trapped drew 6\.0 input nodes a seed where the others drew 50\.0"):
            check_same_work(trapped)

    law()
    with pytest.raises(pytest.fail.Exception):
        assert_caught(law, pipeline, "SAME_WORK_TOLERANCE", 1.0)


def test_a_tuned_process_keeps_its_memory() -> None:
    entries: list[Entry] = [*dgl_entries("input", (0, 1)), *own_entries("input", (0, 1))]
    for entry in entries:
        assert (entry.environment == KEEP_MEMORY) == (entry.who == "tuned")
        assert (entry.options.get("gather") == "kept") == (entry.who == "tuned")
    assert [entry.queue(prefetch=4) for entry in entries if entry.who == "dngd"] == [2, 4]
    assert {entry.queue(prefetch=4) for entry in entries if entry.processes == 1 and entry.who != "dngd"} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("input", "speed")}, "--rows names 'speed'"),
        ({"rows": ()}, "--rows is empty"),
        ({"rows": ("float16",)}, "name both"),
        ({"processes": (0, 0)}, "must be distinct whole numbers"),
        ({"rounds": 0}, "rounds=0 is too small"),
        ({"batches": 0}, "batches=0 is too small"),
        ({"threads": 0}, "threads=0"),
        ({"scale": 0.5}, "scale=0.5"),
    ],
)
def test_bad_options(store: GraphStore, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_pipeline_bench(options(store, **changes))


def test_a_batch_of_all_training_nodes_is_refused(store: GraphStore) -> None:
    whole = options(store).config.model_copy(update={"batch_size": "full"})
    with pytest.raises(UserError, match="whole training set"):
        run_pipeline_bench(PipelineOptions(whole))


def test_chunks_hold_as_many_batches_of_each_process(store: GraphStore) -> None:
    def chunk(batches: int, processes: tuple[int, ...]) -> int:
        return pipeline._Bench(options(store, batches=batches, processes=processes), store, 1, BenchProgress()).chunk

    assert [chunk(8, (0, 1, 2)), chunk(7, (0, 2)), chunk(1, (0,)), chunk(5, (2, 3)), chunk(8, (4, 16))] == [
        8,
        8,
        1,
        6,
        16,
    ]


@pytest.mark.slow
def test_real_processes(store: GraphStore) -> None:
    """All contenders as processes of their own, DataLoader workers and samplers included."""
    result = run_pipeline_bench(options(store, rows=("training", "memory"), processes=(1,), rounds=1))
    assert {c["processes"] for c in result["rows"]["training"]["comparison"]} == {1, None}
    memory = result["rows"]["memory"]
    assert [of["processes"] for of in memory["counts"]] == [1, 2, 3], "a worker draws in a thread of its own"
    for of in memory["added"]:
        parts = of["model_gradients_and_optimizer"] + of["batch_buffers"] + of["beyond_model_and_buffers"]
        assert parts == of["total"] > 0
    assert [(of["samplers"], of["processes"]) for of in memory["samplers"]] == [(1, 3), (4, 6)], "one forks the others"
    assert memory["added_by_a_sampler"]["total"] > 0
