"""`dngd bench comm` on a tiny graph, real processes: who sends what, and how it is compared. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn

from dngd.bench.comm import CommOptions, compare, mean_over_ranks, run_comm_bench
from dngd.bench.network_tables import print_comm
from dngd.bench.traffic import TimedCommunicator, curvature_bytes, full_matrix_bytes, total_bytes
from dngd.cli import main
from dngd.comm import Communicator, LocalCommunicator
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.optim import FactorLayout, KFACPreconditioner
from dngd.train.plan import make_plan

PERIOD = 4
COMM = "comm --num-layers 2 --hidden 8 --fanout 3,3 --batch-size 50 --steps 5 --turn 3 --warmup 5 --threads 1"
COMM += f" --set kfac.kl_bound_period={PERIOD}"
COMM += f" --set kfac.inverse_update_period={PERIOD} --set kfac.factor_update_period=2 --set kfac.dense_steps=2"


@pytest.mark.slow
def test_two_worlds_of_two_processes(store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "comm.json"
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *COMM.split(), "--dataset", str(store.path), "--json", "--out", str(path)])
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.err) == (0, "")
    result = json.loads(captured.out, parse_constant=pytest.fail)
    assert json.loads(path.read_text()) == result

    # 5 steps are rounded up to two periods of 4, which turns of 2 divide.
    assert (result["steps"]["measured"], result["steps"]["turn"], result["steps"]["warmup"]) == (8, 2, 5)
    adam, kfac = result["optimizers"]["adam"], result["optimizers"]["kfac"]
    assert adam["steps"] == kfac["steps"] == 8
    assert len(adam["turn_mean_ms"]) == len(kfac["turn_mean_ms"]) == 4
    # The same shards: both worlds drew the same edges.
    assert adam["mean_edges_a_step"] == kfac["mean_edges_a_step"] > 0
    # Bytes are what the plan of this run says: a gradient buffer a step; every layer's factors once a period, at most
    # in twice the bytes an entry where they cannot bear rounding; inverses at most, each with a byte before it.
    plan = make_plan(_config(store), store, store.split("masks"))
    assert set(adam["bytes"]) == {"gradient"}
    assert adam["bytes"]["gradient"] == kfac["bytes"]["gradient"] == 8 * plan.gradient_bytes_per_step
    assert 2 * plan.factor_bytes_per_refresh <= kfac["bytes"]["factor"] <= 4 * plan.factor_bytes_per_refresh
    assert kfac["bytes"].get("inverse", 0) <= 2 * (2 * plan.inverse_bytes_per_refresh + 2 * len(plan.layers))
    comparison = result["comparison"]["kfac"]
    measured = comparison["traffic"]["measured_steps"]
    assert measured["curvature_bytes"] == sum(kfac["bytes"].values()) - kfac["bytes"]["gradient"] - kfac["bytes"].get(
        "state", 0
    )
    assert measured["curvature_over_gradient"] == pytest.approx(measured["curvature_bytes"] / kfac["bytes"]["gradient"])
    for found in comparison["targets"].values():
        assert found["reached"] == (found["value"] <= found["at_most"])
    print_comm(result, Console(width=200))
    shown = capsys.readouterr().out
    for words in ("2 processes, small", "kfac refresh", "factor, MB a step", "target 0.03", "whole periods of 4"):
        assert words in shown


def _config(store: GraphStore) -> TrainConfig:
    return TrainConfig(
        dataset=str(store.path),
        model="sage",
        num_layers=2,
        hidden=8,
        fanout=(3, 3),
        batch_size=50,
        engine="local",
        num_workers=2,
    )


def results(step_ms: float, draw_ms: float, **more: Any) -> dict[str, Any]:
    whole = dict.fromkeys(("mean_ms", "p50_ms", "p99_ms"), step_ms)
    apart = dict.fromkeys(("mean_ms", "p50_ms", "p99_ms"), step_ms - draw_ms)
    return {"step": whole, "step_without_drawing": apart, "steps": 100, "warmup_steps": 60, **more}


def test_a_comparison_by_hand() -> None:
    adam = results(100.0, 20.0)
    kfac = results(
        104.0,
        20.0,
        bytes={"gradient": 1000, "factor": 10, "inverse": 5, "state": 99},
        warmup_bytes={"gradient": 600, "factor": 60, "inverse": 30},
        full_matrix_bytes_a_step=2,
    )
    found = compare(kfac, adam, run_steps=960)
    assert found["step_ratio"]["mean"] == pytest.approx(1.04)
    # 4 ms more over 80 ms.
    assert found["step_ratio"]["added_over_step_without_drawing"] == pytest.approx(1.05)
    assert found["targets"]["step_over_adam"]["value"] == pytest.approx(1.05)
    # 60 steps of the start, as measured, and 900 at the measured rate.
    assert found["traffic"]["run"]["bytes"] == {"gradient": 9600, "factor": 150, "inverse": 75, "state": 891}
    assert found["targets"]["curvature_over_gradient"]["value"] == pytest.approx(225 / 9600)
    assert found["targets"]["curvature_over_gradient"]["reached"]
    assert found["targets"]["curvature_over_full_matrices"]["value"] == pytest.approx(225 / 1920)
    assert not found["targets"]["curvature_over_full_matrices"]["reached"]
    assert found["traffic"]["measured_steps"]["curvature_over_gradient"] == pytest.approx(15 / 1000)


def test_a_buffer_counts_once_whoever_holds_it() -> None:
    ranks = [{"gradient": 8, "factor": 4, "inverse": 3}, {"gradient": 8, "factor": 4, "inverse": 2, "shared": 7}]
    found = total_bytes(ranks)
    assert found == {"gradient": 8, "factor": 4, "inverse": 5, "shared": 7}
    # Kinds that a strategy invents are curvature; evaluation and state are not.
    assert curvature_bytes(found | {"state": 50, "evaluation": 60}) == 4 + 5 + 7


def test_steps_are_the_means_over_ranks() -> None:
    assert mean_over_ranks([[1.0, 4.0], [3.0, 6.0]]) == [2.0, 5.0]


class Other(LocalCommunicator):
    """Has collectives that no other communicator knows."""

    def swap(self, flat: torch.Tensor) -> Any:
        return flat, LocalCommunicator().all_reduce(flat, "state")

    def share(self, payload: list[int]) -> Any:
        return LocalCommunicator().all_reduce(torch.zeros(1), "state") if payload else 7


def test_a_timed_communicator_passes_on_what_it_does_not_know() -> None:
    inner = Other()
    timed = TimedCommunicator(inner)
    assert (timed.rank, timed.world_size) == (0, 1)
    assert timed.share([]) == 7
    work = timed.share([1])
    before = timed.seconds
    work.wait()
    assert timed.seconds > before > 0
    timed.all_reduce(torch.zeros(1), "gradient").wait()
    buffer, under_way = timed.swap(torch.ones(2))
    before = timed.seconds
    under_way.wait()
    assert timed.seconds > before
    assert buffer.tolist() == [1, 1]
    assert timed.calls == {"share": 2, "all_reduce": 1, "swap": 1}
    inner.bytes_sent["x"] = 3
    assert timed.bytes_sent == {"x": 3}
    with pytest.raises(AttributeError):
        _ = timed.nothing
    pre = KFACPreconditioner(nn.Linear(3, 2), communicator=cast(Communicator, timed))
    pre.close()


def test_full_matrices_by_hand() -> None:
    pre = KFACPreconditioner(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    assert full_matrix_bytes(pre) == 4 * (7**2 + 5**2 + 6**2 + 3**2)
    pre.close()
    blocks = FactorLayout(4, "block_diagonal")
    pre = KFACPreconditioner(nn.Linear(7, 2), layout=blocks)
    assert full_matrix_bytes(pre) == 4 * (4**2 + 4**2 + 2**2)
    pre.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 1}, "processes=1 is too small; give at least 2"),
        ({"processes": 100}, "processes=100 is above 64"),
        ({"steps": 0}, "steps=0"),
        ({"turn": 0}, "turn=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"threads": 0}, "threads=0"),
        ({"variants": "kfac:kfac.damping=1"}, "'kfac', which is in use"),
        ({"variants": "one:kfac.nothing=1"}, r"kfac\.nothing"),
    ],
)
def test_bad_options(store: GraphStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_comm_bench(CommOptions(_config(store), **options))


def test_a_batch_beyond_the_training_set_is_refused(store: GraphStore) -> None:
    with pytest.raises(UserError, match="larger than the training set"):
        run_comm_bench(CommOptions(_config(store).model_copy(update={"batch_size": 200})))


@pytest.mark.slow
def test_a_rank_that_fails_ends_its_world(tmp_path: Path, store: GraphStore) -> None:
    huge = GraphStore.write(
        tmp_path / "huge",
        indptr=store.indptr,
        indices=store.indices,
        features=store.features * 1e37,
        labels=store.labels,
        masks=store.split_masks,
    )
    config = _config(store).model_copy(update={"dataset": str(huge.path)})
    with pytest.raises(TrainingError, match=r"adam, rank \d failed: adam had non-finite gradients"):
        run_comm_bench(CommOptions(config, steps=1, warmup=1, threads=1))
