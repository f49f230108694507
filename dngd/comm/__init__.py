"""Communication: packing, collectives, ownership of factors. The only package that calls torch.distributed."""

from dngd.comm.assignment import assign_owners, shards_of_rank
from dngd.comm.communicator import (
    Communicator,
    LocalCommunicator,
    ProcessGroupCommunicator,
    Work,
    current_communicator,
    destroy_process_group,
    init_process_group,
)
from dngd.comm.gradients import FlatGradients, StepSums
from dngd.comm.packing import buckets, flatten, unflatten

__all__ = [
    "Communicator",
    "FlatGradients",
    "LocalCommunicator",
    "ProcessGroupCommunicator",
    "StepSums",
    "Work",
    "assign_owners",
    "buckets",
    "current_communicator",
    "destroy_process_group",
    "flatten",
    "init_process_group",
    "shards_of_rank",
    "unflatten",
]
