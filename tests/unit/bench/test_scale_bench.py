"""`dngd bench scale`: which half is fitted, that errors are told, hosts that come and go. No time is asserted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dngd.bench import network as hosts
from dngd.bench.cost_model import Load, Network, all_reduce, broadcast, predict_step
from dngd.bench.network import INTERFACE, check_tools, host_network, left_behind
from dngd.bench.network_tables import print_scale
from dngd.bench.scale import ScaleOptions, run_scale_bench
from dngd.bench.scale_settings import joined, mean_compute, mean_step, measured_load, predict_settings, turn_places
from dngd.cli import main
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore


def settings(network: Network, off: float = 1.0) -> list[dict[str, Any]]:
    """Settings as a run measures them, made by a network; the last half is off by a factor."""
    made = []
    for number in (2, 4):
        for optimizer, extra in (("adam", 0.0), ("kfac", 0.02)):
            for width, size in ((256, 0.8e6), (512, 2.7e6)):
                for megabits in (1000.0, 100.0):
                    load = all_reduce(number, size * (1 + extra)) + broadcast(number, size * extra, 0.1)
                    seconds = predict_step(0.05, load, megabits * 1e6 / 8, network)
                    made.append(
                        {
                            "hosts": number,
                            "optimizer": optimizer,
                            "width": width,
                            "megabits": megabits,
                            "compute_seconds": 0.05,
                            "load": {"rounds": load.rounds, "link_bytes": load.link_bytes},
                            "step_seconds": seconds,
                        }
                    )
    return made


def test_half_is_fitted_and_the_other_half_predicted() -> None:
    true = Network(2e-4, 0.9, 2e-9)
    report = predict_settings(settings(true))
    assert report["fit"]["efficiency"] == pytest.approx(0.9, rel=1e-3)
    assert (report["fit"]["fitted_on"], report["prediction"]["predicted"]) == (8, 8)
    for name in ("hosts", "optimizer", "width", "megabits"):
        halves = [{s[name] for s in report["settings"] if s["used_for"] == which} for which in ("fit", "prediction")]
        assert halves[0] == halves[1]
        assert len(halves[0]) == 2
    assert report["prediction"]["largest_error"] < 1e-3
    assert report["prediction"]["reached"]
    assert report["prediction"]["within"] == 8


def test_a_setting_that_the_model_does_not_explain_misses_the_target() -> None:
    measured = settings(Network(2e-4, 0.9, 2e-9))
    place = next(i for i, s in enumerate(predict_settings(measured)["settings"]) if s["used_for"] == "prediction")
    measured[place]["step_seconds"] *= 1.5
    errors = predict_settings(measured)["prediction"]
    assert errors["largest_error"] == pytest.approx(1 / 3, rel=1e-2)
    assert (errors["within"], errors["reached"]) == (7, False)


def test_steps_that_no_link_explains_are_kept_and_told() -> None:
    measured = [s | {"step_seconds": s["compute_seconds"]} for s in settings(Network(2e-4, 0.9))]
    report = predict_settings(measured)
    assert "no rate to be fitted" in report["fit"]["failed"]
    assert report["prediction"] is None
    assert [s["step_seconds"] for s in report["settings"]] == [s["step_seconds"] for s in measured]


def test_what_ranks_measured_becomes_compute_and_load() -> None:
    ranks = [
        {"seconds": {"step": [3.0, 5.0], "collective": [1.0, 1.0]}},
        {"seconds": {"step": [3.0, 5.0], "collective": [0.5, 2.0]}},
    ]
    assert mean_step({"ranks": ranks}) == 4.0
    # The slower rank of each step: 2.5 and 4.
    assert mean_compute({"ranks": ranks}) == 3.25
    load = measured_load({"gradient": 800, "factor": 200, "inverse": 50}, {"all_reduce": 6, "broadcast": 2}, 4, 2)
    assert load == Load((6 * 6 + 2 * 2) / 2, (1.5 * 1000 + 2 * 50) / 2)
    # Two halves of an all-reduce have its latencies and bytes.
    halves = {"all_reduce": 5, "exchange": 1, "all_gather": 1, "broadcast": 2}
    assert measured_load({"gradient": 800, "factor": 200, "inverse": 50}, halves, 4, 2) == load


@given(st.integers(1, 12), st.integers(1, 6))
def test_every_rate_has_every_point_of_a_period_once(turns: int, places: int) -> None:
    order = turn_places(turns, places)
    for place in range(places):
        points = [k % turns for k, of in enumerate(order) if of == place]
        assert sorted(points) == list(range(turns))


def test_answers_of_turns_become_one() -> None:
    def answer(start: float) -> dict[str, Any]:
        one = {"seconds": {"step": [start, start + 1]}, "bytes": {"gradient": 8}, "calls": {"all_reduce": 2}}
        return {"ranks": [one, one | {"bytes": {"gradient": 8, "inverse": 1}}]}

    assert joined([answer(1.0), answer(5.0)]) == {
        "ranks": [
            {"seconds": {"step": [1.0, 2.0, 5.0, 6.0]}, "bytes": {"gradient": 16}, "calls": {"all_reduce": 4}},
            {
                "seconds": {"step": [1.0, 2.0, 5.0, 6.0]},
                "bytes": {"gradient": 16, "inverse": 2},
                "calls": {"all_reduce": 4},
            },
        ]
    }


def options(store: GraphStore, **changes: Any) -> ScaleOptions:
    config = TrainConfig(
        dataset=str(store.path),
        model="sage",
        num_layers=2,
        hidden=8,
        fanout=(10, 10),
        batch_size=50,
        num_samplers=0,
        engine="local",
        kfac={"inverse_update_period": 4, "kl_bound_period": 4, "factor_update_period": 2, "dense_steps": 2},
    )
    return ScaleOptions(config, scale=1.0, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hosts": (1, 2)}, "--hosts 1,2 must be numbers from 2"),
        ({"hosts": (2, 2)}, "--hosts 2,2 must be distinct"),
        ({"megabits": ()}, "--mbits"),
        ({"megabits": (100.0,), "widths": (1, 2, 3)}, "at least 2 rates"),
        ({"widths": (0, 8)}, "--widths 0,8"),
        ({"optimizers": ("soap",)}, "'soap'"),
        ({"optimizers": ("adam", "adam")}, "each optimizer once"),
        ({"hosts": (2,), "widths": (8,)}, "4 settings"),
        ({"steps": 0}, "steps=0"),
        ({"threads": 512}, "need more than this machine's"),
    ],
)
def test_bad_options(store: GraphStore, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_scale_bench(options(store, **changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("scale --hosts 2,x", "--hosts '2,x'"),
        ("scale --mbits 100", "at least 2 rates"),
        ("scale --batch-size full", "batch_size=full"),
        ("scale --compute fast", "--compute fast"),
        ("scale --gbits 0", "--gbits 0"),
        ("scale --set seed=1", "seed cannot be set here"),
        ("scale --out /no/such/folder/x.json", "--out"),
        ("comm --processes 1", "processes=1"),
        ("comm --variants x", "--variants 'x'"),
        ("comm --set kfac.dampin=1", "did you mean kfac.damping?"),
        ("comm --out /no/such/folder/x.json", "--out"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments.split()])
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.out) == (2, "")
    assert message in captured.err
    assert captured.err.startswith("dngd: ")
    assert captured.err.count("\n") == 1


def test_what_is_missing_is_told_in_one_sentence(
    store: GraphStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is opened before."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "scale", "--dataset", "nowhere"])
    err = capsys.readouterr().err
    assert (exit_info.value.code, err.count("\n")) == (2, 1)
    assert "tc not found" in err
    assert "apt-get install iproute2" in err
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="run this as root"):
        check_tools()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="run this on Linux"):
        check_tools()


def test_a_kernel_that_refuses_is_told_and_all_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        refused = command[:4] == ("ip", "-n", f"dngd-bench-{os.getpid()}-switch", "link") and "veth" in command
        return subprocess.CompletedProcess(
            command, 2 if refused else 0, "", "Operation not\npermitted" if refused else ""
        )

    monkeypatch.setattr(hosts, "check_tools", lambda: None)
    monkeypatch.setattr(hosts, "remove_stale", lambda: None)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"veth peer name eth0 .* failed \(Operation not permitted\)"), host_network(2):
        pytest.fail("there is no network")
    added = [command[3] for command in ran if command[:3] == ("ip", "netns", "add")]
    deleted = [command[3] for command in ran if command[:3] == ("ip", "netns", "delete")]
    assert len(added) == 2
    assert sorted(deleted) == sorted(added)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Skip where hosts cannot be made; afterwards none may be left."""
    try:
        check_tools()
        with host_network(1):
            pass
    except UserError as error:
        pytest.skip(str(error))
    yield
    assert _mine() == []


def _mine() -> list[str]:
    return sorted(path.name for path in hosts.NAMESPACES.glob(f"dngd-bench-{os.getpid()}-*"))


@pytest.mark.usefixtures("namespaces")
def test_hosts_reach_each_other_at_the_rate_of_their_links() -> None:
    """Not a test of timing: tbf's setting is read back."""
    with host_network(2) as network:
        assert len(_mine()) == 3
        server = "import socket; s = socket.create_server(('10.213.0.1', 5000)); print('up', flush=True); "
        server += "print(s.accept()[0].recv(9).decode())"
        listening = subprocess.Popen(
            [*network.prefix(0), sys.executable, "-c", server], stdout=subprocess.PIPE, text=True
        )
        assert listening.stdout is not None
        with listening.stdout:
            assert listening.stdout.readline() == "up\n"
            client = "import socket; socket.create_connection(('10.213.0.1', 5000), 5).send(b'reached')"
            subprocess.run([*network.prefix(1), sys.executable, "-c", client], check=True, timeout=30)
            assert listening.stdout.read() == "reached\n"
        assert listening.wait(30) == 0
        network.limit(None)
        network.limit(100)
        for host in range(2):
            shown = subprocess.run(
                [*network.prefix(host), "tc", "qdisc", "show", "dev", INTERFACE],
                check=True,
                capture_output=True,
                text=True,
            )
            assert "tbf" in shown.stdout
            assert "rate 100Mbit" in shown.stdout
    assert _mine() == []


HOLDER = """
import time
from dngd.bench.children import ended_by_sigterm
from dngd.bench.network import host_network
with ended_by_sigterm(), host_network(2):
    print("made", flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_hosts_are_removed_however_a_benchmark_ends(number: signal.Signals) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "made\n"
        own = f"dngd-bench-{holder.pid}-*"
        assert len(list(hosts.NAMESPACES.glob(own))) == 3
        holder.send_signal(number)
        holder.wait(30)
    if number == signal.SIGKILL:
        # Nothing can be done then; the next benchmark does it.
        assert len(left_behind()) >= 3
        with host_network(1):
            pass
    deadline = time.monotonic() + 10
    while list(hosts.NAMESPACES.glob(own)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(hosts.NAMESPACES.glob(own))


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_small_run_over_limited_links(store: GraphStore, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "scale --num-layers 2 --hidden 8 --fanout 10,10 --batch-size 100 --hosts 2,3 --mbits 5,2 --widths 256 "
    arguments += "--steps 4 --threads 1 --set kfac.inverse_update_period=4 --set kfac.factor_update_period=2"
    arguments += " --set kfac.kl_bound_period=4"
    path = tmp_path / "scale.json"
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments.split(), "--scale", "1", "--dataset", str(store.path), "--json", "--out", str(path)])
    captured = capsys.readouterr()
    assert exit_info.value.code == 0
    # On a busy machine it takes longer than the half minute after which progress is told.
    told = captured.err.splitlines()
    assert all(re.fullmatch(r"\d hosts.*: \d of 9, .*/s, about .* left", line) for line in told), told
    result = json.loads(captured.out, parse_constant=pytest.fail)
    assert json.loads(path.read_text()) == result
    assert len(result["settings"]) == 8
    cpus = len(os.sched_getaffinity(0))
    for setting in result["settings"]:
        assert setting["compute_is"] == ("real" if setting["hosts"] <= cpus else "a sleep")
        # What a link must carry takes its time, whatever else does.
        load, rate = setting["load"]["link_bytes"], setting["megabits"] * 1e6 / 8
        assert load > 40e3
        assert setting["step_seconds"] >= 0.9 * (load - 8e3) / rate
        if result["prediction"] is not None:
            off = setting["predicted_seconds"] - setting["step_seconds"]
            assert setting["error"] == pytest.approx(abs(off) / setting["step_seconds"])
    assert result["model"]["label"] == "a model, not a measurement"
    assert "no GPU" in result["model"]["compute"]["source"]
    print_scale(result, Console(width=200))
    shown = capsys.readouterr().out
    for words in ("Step over limited links, small", "is a sleep of its measured time", "A MODEL, not a measurement"):
        assert words in shown
