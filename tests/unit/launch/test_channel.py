"""What a failure means: who was lost, where, and whether workers are started again."""

from __future__ import annotations

from typing import Any

from dngd.launch.channel import RunChannel


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def beat(rank: int, phase: str, step: int, *, attempt: int = 1, phase_seconds: float = 0.0) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "rank": rank,
        "pid": 1000 + rank,
        "started": 1.0,
        "node_id": "ab",
        "node_name": f"host-{rank}",
        "phase": phase,
        "step": step,
        "phase_seconds": phase_seconds,
        "record": f"/tmp/{attempt}-{rank}.phase",
    }


def begun(world_size: int = 2, *, max_failures: int = 3) -> tuple[RunChannel, Clock]:
    clock = Clock()
    channel = RunChannel(max_failures, clock)
    assert channel.begin(world_size)["number"] == 1
    return channel, clock


def test_a_lost_worker_is_named_and_started_again() -> None:
    channel, clock = begun()
    channel.beat(beat(0, "reduce", 57))
    channel.beat(beat(1, "backward", 57))
    channel.failed(beat(0, "reduce", 57), "training", "rank 0 of 2: all-reduce failed")
    assert channel.group_failed([1], {0: "rank 0 of 2: all-reduce failed"}) is None
    clock.seconds += 7
    assert channel.waiting() == (7.0, None)
    attempt = channel.begin(2)
    assert attempt["reason"] == "rank 1 (pid 1001 on host-1) was lost, last heard in phase backward of step 57"
    assert (attempt["number"], attempt["recoveries"], attempt["reached_step"]) == (2, 1, 57)
    assert channel.waiting()[0] == 0.0


def test_the_controller_is_known_from_its_start() -> None:
    channel = RunChannel(3)
    assert channel.waiting()[1] is None
    channel.controlled_by("controller")
    assert channel.waiting()[1] == "controller"


def test_a_loss_that_its_peers_notice_first_is_still_of_the_one_that_is_gone() -> None:
    channel, _ = begun()
    channel.beat(beat(0, "reduce", 5))
    channel.beat(beat(1, "sample_wait", 5))
    channel.failed(beat(0, "reduce", 5), "training", "rank 0 of 2: all-reduce failed")
    assert channel.group_failed([], {0: "rank 0 of 2: all-reduce failed"}) is None
    said = channel.begin(2)["reason"]
    assert said.startswith("rank 1 (pid 1001 on host-1) was lost or is stuck, last heard in phase sampling")


def test_what_cannot_be_mended_is_given_up_at_once_with_its_own_sentence() -> None:
    for kind in ("user", "diverged"):
        channel, _ = begun()
        channel.failed(beat(0, "evaluation", 9), kind, "no space; free some")
        # The other rank's broken connection comes second, and is not the reason.
        channel.failed(beat(1, "reduce", 9), "training", "rank 1 of 2: all-reduce failed")
        assert channel.group_failed([], {0: "no space; free some", 1: "..."}) == "no space; free some"
        assert channel.verdict() == {"kind": kind, "text": "no space; free some"}


def test_failures_are_counted_between_checkpoints() -> None:
    channel, _ = begun(max_failures=2)
    for _ in range(5):
        # A newer checkpoint each time: the run gets on, however often it fails.
        assert channel.group_failed([1], {}) is None
        attempt = channel.begin(2)
        channel.resumed(attempt["number"], 10 * attempt["number"], 4)
        channel.checkpointed(10 * attempt["number"])
    assert channel.begin(2)["steps_repeated"] == 20
    for _ in range(2):
        assert channel.group_failed([1], {}) is None
        channel.begin(2)
        channel.checkpointed(20)  # an older one again is no progress
    text = channel.group_failed([1], {})
    assert text is not None
    assert "3 failures of workers in a row without a newer checkpoint" in text
    assert "--resume" in text


def test_no_failure_is_recovered_from_with_max_failures_zero() -> None:
    channel, _ = begun(max_failures=0)
    channel.beat(beat(1, "forward", 3))
    assert channel.group_failed([1], {}) == (
        "rank 1 (pid 1001 on host-1) was lost, last heard in phase forward of step 3; go on with --resume"
    )


def test_an_error_that_comes_again_is_given_up() -> None:
    channel, _ = begun(max_failures=9)
    channel.failed(beat(0, "forward", 3), "other", "a worker failed: TypeError: nothing")
    assert channel.group_failed([], {0: "TypeError"}) is None
    channel.begin(2)
    channel.failed(beat(0, "forward", 3, attempt=2), "other", "a worker failed: TypeError: nothing")
    text = channel.group_failed([], {0: "TypeError"})
    assert text == "a worker failed: TypeError: nothing (again after workers were started again)"


def test_silence_is_a_stall_and_slow_work_is_none() -> None:
    channel, clock = begun()
    channel.beat(beat(0, "reduce", 8))
    channel.beat(beat(1, "backward", 8))
    clock.seconds += 4
    channel.beat(beat(0, "reduce", 8, phase_seconds=4.0))
    assert channel.stalls(5.0) == []
    clock.seconds += 2
    [stall] = channel.stalls(5.0)
    assert (stall["rank"], stall["pid"]) == (1, 1001)
    # Its flight record knows better than the last beat.
    diagnosis = channel.killed(stall, ("reduce", 8))
    assert diagnosis == "rank 1 (pid 1001 on host-1) has been silent for 6 s in phase reduce of step 8"
    assert channel.stalls(5.0) == [], "each is killed once"
    channel.group_failed([1], {})
    assert channel.begin(2)["reason"] == diagnosis, "told once, as what it was"


def test_a_flight_record_says_where_a_lost_worker_was() -> None:
    channel, _ = begun()
    channel.beat(beat(0, "reduce", 57))
    channel.beat(beat(1, "backward", 57))
    channel.group_failed([1], {})
    [asked] = channel.unlocated()
    assert asked["rank"] == 1
    assert channel.unlocated() == [], "asked once"
    channel.located(asked, "optimizer", 59)
    attempt = channel.begin(2)
    assert attempt["reason"] == "rank 1 (pid 1001 on host-1) was lost in phase optimizer of step 59"
    assert attempt["reached_step"] == 59


def test_a_rank_that_keeps_all_others_waiting_is_a_stall() -> None:
    channel, _ = begun(3)
    for rank in (0, 1):
        channel.beat(beat(rank, "reduce", 8, phase_seconds=30.0))
    channel.beat(beat(2, "sample_wait", 8, phase_seconds=31.0))
    [stall] = channel.stalls(20.0)
    assert channel.killed(stall, None) == (
        "rank 2 (pid 1002 on host-2) has kept the others waiting for 31 s, last heard in phase sampling of step 8"
    )
    channel, _ = begun(3)
    channel.beat(beat(0, "reduce", 8, phase_seconds=30.0))
    channel.beat(beat(2, "sample_wait", 8, phase_seconds=31.0))
    channel.beat(beat(1, "backward", 8, phase_seconds=30.0))
    assert channel.stalls(20.0) == [], "two at work: nobody waits for one alone"
    for rank in (0, 1, 2):
        channel.beat(beat(rank, "evaluation", 8, phase_seconds=300.0))
    assert channel.stalls(20.0) == [], "an evaluation may take long"


def test_finished_and_lost_workers_are_not_watched() -> None:
    channel, clock = begun()
    channel.beat(beat(0, "reduce", 8))
    channel.beat(beat(1, "reduce", 8))
    channel.left(beat(1, "reduce", 8))
    channel.group_failed([0], {})
    channel.begin(2)
    channel.beat(beat(0, "reduce", 8))  # of the attempt before: late
    clock.seconds += 1000
    assert channel.stalls(5.0) == []


def test_more_workers_are_no_loss() -> None:
    channel, _ = begun(1)
    channel.beat(beat(0, "reduce", 8))
    assert channel.begin(2)["reason"] == "the cluster has room for 2 workers instead of 1"


def test_a_failure_that_ray_tells_of_several_times_counts_once() -> None:
    channel, clock = begun(max_failures=1)
    channel.beat(beat(0, "reduce", 5))
    channel.beat(beat(1, "sample_wait", 5))
    channel.failed(beat(0, "reduce", 5), "other", "the node is going")
    for _ in range(6):
        assert channel.group_failed([1], {}) is None
        clock.seconds += 2
    assert channel.group_failed([0, 1], {}) is None
    said = channel.begin(2)["reason"]
    assert said.count("rank 1") == 1
    assert said.count("rank 0") == 1, "what is known later is told too"
    # The next start's failures are others.
    assert channel.group_failed([1], {}) is not None


def test_workers_taken_away_without_a_failure_are_waited_for() -> None:
    channel, clock = begun()
    channel.beat(beat(0, "forward", 5))
    channel.beat(beat(1, "forward", 5))
    clock.seconds += 20
    assert channel.waiting()[0] == 0.0
    clock.seconds += 25
    assert channel.waiting()[0] == 45.0
    channel.beat(beat(1, "forward", 5))
    assert channel.waiting()[0] == 0.0


def test_a_rank_that_sets_up_or_calls_back_is_left_in_peace_and_one_a_step_behind_is_not() -> None:
    for phase, step, named in (
        ("setup", 0, []),
        ("callback", 7, []),
        ("optimizer", 7, [1]),
        ("optimizer", 6, [1]),
        ("optimizer", 5, []),
    ):
        channel, _ = begun()
        waits = 0 if phase == "setup" else 7
        channel.beat(beat(0, "reduce", waits, phase_seconds=80))
        channel.beat(beat(1, phase, step, phase_seconds=90))
        assert [stall["rank"] for stall in channel.stalls(60)] == named, (phase, step)
