"""Starting a run: `Trainer`, and Ray (imported only when a run needs it)."""

from dngd.launch.trainer import Trainer

__all__ = ["Trainer"]
