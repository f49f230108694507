"""Natural-gradient optimizers for your own loop, and the schedules that drive them.

Import from here: `from dngd.optim import KFACPreconditioner, NaturalGradient`.
"""

from dngd.optim.natural_gradient import NaturalGradient
from dngd.optim.preconditioner import KFACPreconditioner
from dngd.optim.schedules import Schedule, UpdateSchedule, learning_rate, value_at

__all__ = [
    "KFACPreconditioner",
    "NaturalGradient",
    "Schedule",
    "UpdateSchedule",
    "learning_rate",
    "value_at",
]
