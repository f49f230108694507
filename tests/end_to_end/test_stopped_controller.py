"""A process of Ray's own that is stopped holds no program for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dngd.graph import GraphStore
from tests.helpers import survival

LIMIT_SECONDS = 45.0
"""Enough for the controller to start on a busy machine: until then there is none to stop."""

IN_A_THREAD = """
import sys, threading
import dngd

said = []

def fit():
    try:
        dngd.Trainer(dngd.TrainConfig.from_yaml(sys.argv[1])).fit()
    except dngd.TrainingError as error:
        said.append(str(error))

thread = threading.Thread(target=fit)
thread.start()
thread.join()
print(said)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_fit_in_a_thread_ends_though_rays_controller_is_stopped(store: GraphStore, tmp_path: Path) -> None:
    """It says why, soon after recovery_timeout_seconds, and leaves none of its processes."""
    ray = {"recovery_timeout_seconds": LIMIT_SECONDS, "cpus_per_worker": 0.1}
    (tmp_path / "config.yaml").write_text(survival.settings(store, tmp_path / "run", ray=ray).to_yaml())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen(
        [sys.executable, "-c", IN_A_THREAD, str(tmp_path / "config.yaml")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        controller = named(driver, "ray::TrainController", 120)
        controller.send_signal(signal.SIGSTOP)
        out, said = driver.communicate(timeout=LIMIT_SECONDS + 60)
        assert "did not run 2 workers within 45 s; go on with --resume" in out, out + said
        assert not controller.is_running()
    finally:
        for process in [*psutil.Process(driver.pid).children(recursive=True)] if driver.poll() is None else []:
            process.kill()
        driver.kill()


def named(driver: subprocess.Popen[str], name: str, seconds: float) -> psutil.Process:
    """Return the driver's descendant that calls itself so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(name):
                    return process
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError(f"no {name} after {seconds} s")
