"""A run's driver with faults in its workers: `python -m tests.helpers.fault_driver CONFIG.yaml FAULTS.json HIT_FOLDER`.

It connects to Ray itself, as a user's program may, and leaves the rest to dngd.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import ray

import dngd
from tests.helpers.faults import HIT, PLAN

ROOT = Path(__file__).parents[2]


def main() -> None:
    settings, faults, hit = (Path(argument) for argument in sys.argv[1:])
    ray.init(
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={
            "worker_process_setup_hook": "tests.helpers.faults.install",
            "env_vars": {PLAN: faults.read_text(), HIT: str(hit), "PYTHONPATH": str(ROOT)},
        },
    )
    try:
        dngd.Trainer(dngd.TrainConfig.from_yaml(settings)).fit()
    except (dngd.UserError, dngd.TrainingError) as error:
        print(f"dngd: {error}", file=sys.stderr)
        os._exit(2 if isinstance(error, dngd.UserError) else 1)


if __name__ == "__main__":
    main()
