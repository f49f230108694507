"""Communication: packing, collectives, ownership of factors, costs. The only package that calls torch.distributed."""

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
from dngd.comm.cost_model import (
    STRATEGIES,
    LayerCost,
    Line,
    Network,
    Strategy,
    choose_strategy,
    seconds_per_step,
)
from dngd.comm.gradients import FlatGradients, StepSums
from dngd.comm.machines import Agreement, ranks_are_alike
from dngd.comm.packing import buckets, flatten, unflatten
from dngd.comm.probe import probe_network
from dngd.comm.rounding import RoundedReduction

__all__ = [
    "Agreement",
    "STRATEGIES",
    "Communicator",
    "FlatGradients",
    "LayerCost",
    "Line",
    "LocalCommunicator",
    "Network",
    "ProcessGroupCommunicator",
    "RoundedReduction",
    "StepSums",
    "Strategy",
    "Work",
    "assign_owners",
    "buckets",
    "choose_strategy",
    "current_communicator",
    "destroy_process_group",
    "flatten",
    "init_process_group",
    "probe_network",
    "ranks_are_alike",
    "seconds_per_step",
    "shards_of_rank",
    "unflatten",
]
