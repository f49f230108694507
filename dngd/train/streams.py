"""Words that keep the random streams of weights and dropout apart from the sampler's (dngd.sampling.derive_seed)."""

WEIGHTS_STREAM = 11
DROPOUT_STREAM = 12
