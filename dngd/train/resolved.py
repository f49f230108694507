"""What fields that a configuration leaves open stand for in a run, as result.json and a plan have it."""

from __future__ import annotations

from typing import Any

from dngd.config import TrainConfig
from dngd.optim import output_rank_for
from dngd.optim.natural_gradient import MOMENTA
from dngd.train.optimizers import TrainingSet, damping_in_use, inverse_rank_in_use


def settings_in_use(config: TrainConfig, training_set: TrainingSet) -> dict[str, Any]:
    """Return, by dotted name, the values in use of the fields whose default is a rule; None: the rule gives none.

    Fields without a use in this run are left out. kfac.damping_g is no field: λ of G, where it is a share of tr G.
    """
    found: dict[str, Any] = {"fanout": list(config.fanouts), "num_shards": config.shards}
    if config.optimizer != "custom":
        found["lr"] = config.learning_rate
    found["lr_schedule"] = config.schedule
    found["metric"] = config.metric_in_use
    if config.task == "link":
        found["embedding"] = config.embedding_width
    if config.engine == "ray":
        found |= {"ray.backend": config.collective_backend, "ray.min_workers": config.min_workers}
    return found | (_kfac(config, training_set) if config.optimizer == "kfac" else {})


def _kfac(config: TrainConfig, training_set: TrainingSet) -> dict[str, Any]:
    kfac = config.kfac
    damping, g_ratio = damping_in_use(config, training_set)
    found: dict[str, Any] = {
        "fisher": config.fisher,
        "damping": damping,
        "damping_mode": config.damping_mode,
        "momentum": MOMENTA[kfac.update] if kfac.momentum is None else kfac.momentum,
        "output_rank": output_rank_for(damping * g_ratio) if config.output_rank is None else config.output_rank,
        "inverse_rank": inverse_rank_in_use(config, training_set),
        "kl_bound": config.kl_bound,
        # Adam in the eigenbasis has no clip, whatever is asked for.
        "kl_clip": None if kfac.update == "adam_eigenbasis" else config.kl_clip,
    }
    if config.damping_mode == "relative":
        found |= {"damping_g_ratio": g_ratio, "damping_g": damping * g_ratio}
    return {f"kfac.{name}": value for name, value in found.items()}
