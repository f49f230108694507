"""Natural-gradient optimizers for your own loop, and the schedules that drive them.

Import from here: `from dngd.optim import KFACPreconditioner, NaturalGradient`.
"""

from dngd.curvature import FactorLayout, LossKind, output_rank_for
from dngd.optim.averaging import WeightAverage
from dngd.optim.defaults import default_damping
from dngd.optim.footprint import Footprint, inverse_bytes_held, layer_footprint
from dngd.optim.natural_gradient import NaturalGradient
from dngd.optim.preconditioner import KFACPreconditioner
from dngd.optim.schedules import HyperbolicDecay, Period, Schedule, UpdateSchedule, learning_rate, value_at
from dngd.optim.trust import KLTrustRegion, LevenbergMarquardt

__all__ = [
    "FactorLayout",
    "Footprint",
    "HyperbolicDecay",
    "KFACPreconditioner",
    "KLTrustRegion",
    "LevenbergMarquardt",
    "LossKind",
    "NaturalGradient",
    "Period",
    "Schedule",
    "UpdateSchedule",
    "WeightAverage",
    "default_damping",
    "inverse_bytes_held",
    "layer_footprint",
    "learning_rate",
    "output_rank_for",
    "value_at",
]
