"""Random streams of a run: words that keep those of weights and dropout apart from the sampler's
(dngd.sampling.derive_seed), and seeding of torch's own generators."""

import torch

WEIGHTS_STREAM = 11
DROPOUT_STREAM = 12


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the host and, for a step on a GPU, of all GPUs, as `torch.manual_seed` does.

    That one takes some 0.3 ms: for each kind of device that torch knows and this process does not use, it keeps the
    caller's formatted stack. At every step that is a share of it which can be seen.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
