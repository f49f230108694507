"""The training loop and what surrounds it: evaluation, checkpoints, metrics, progress, plans."""

from dngd.train.callbacks import Callback, RunState
from dngd.train.loop import TrainingLoop
from dngd.train.metrics import EvaluationRecord, RunResult
from dngd.train.plan import RunPlan, make_plan
from dngd.train.run import run_rank
from dngd.train.run_folder import RunFolder, check_run_folder, hold_run_folder, prepare_run_folder

__all__ = [
    "Callback",
    "EvaluationRecord",
    "RunFolder",
    "RunPlan",
    "RunResult",
    "RunState",
    "TrainingLoop",
    "check_run_folder",
    "hold_run_folder",
    "make_plan",
    "prepare_run_folder",
    "run_rank",
]
