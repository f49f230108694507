"""ReLU and dropout in one, fast on a CPU.

torch draws dropout's mask on a CPU one number at a time in one thread: in a three-layer GraphSAGE of width 256 at
batch 1024 that is a third of the training step. Here a mask's element takes 1, 8 or 16 random bits of a fast
generator (SFC64) seeded from torch's own stream, so that `torch.manual_seed` rules it as before; and the backward pass
needs no mask, since the output is above 0 exactly where the input was and was kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.errors import UserError

_BLOCK_ELEMENTS = 1 << 21
"""Elements worked on at a time: their random bits are not all in memory at once, and threads meet seldom."""
_MAX_BITS = 16


def relu_dropout(values: Tensor, p: float, training: bool) -> Tensor:
    """Return `dropout(relu(values))`: kept with probability 1 - p and divided by it, else 0.

    On a CPU p is rounded to a multiple of 2^-16 (a half, a quarter and so on are exact), and the division is by what
    was rounded to, so that the expected value is the input's. Elsewhere these are torch's own functions.
    Raises UserError for a p that is not in [0, 1).
    """
    if not 0 <= p < 1:
        raise UserError(f"dropout={p} is out of range; it must be at least 0 and below 1")
    if not training or p == 0.0:
        return F.relu(values)
    if values.device.type != "cpu" or values.numel() == 0:
        return F.dropout(F.relu(values), p=p)
    result: Tensor = _ReluDropout.apply(values, p)  # type: ignore[no-untyped-call]
    return result


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        bits, dropped = _threshold(p)
        scale = 2**bits / (2**bits - dropped)
        source = values.contiguous()
        out = torch.empty_like(source)
        flat_in, flat_out = source.view(-1), out.view(-1)
        # One number of torch's stream: the mask is a function of torch.manual_seed.
        generator = np.random.SFC64(int(torch.randint(0, 2**62, (1,))))
        for first in range(0, flat_in.numel(), _BLOCK_ELEMENTS):
            block = flat_out[first : first + _BLOCK_ELEMENTS]
            torch.clamp(flat_in[first : first + _BLOCK_ELEMENTS], min=0, out=block)
            block.mul_(_kept(generator, block.numel(), bits, dropped)).mul_(scale)
        ctx.save_for_backward(out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, out, 0.0).mul_(ctx.scale), None


def _threshold(p: float) -> tuple[int, int]:
    """Return (b, t): b random bits an element, which is dropped where they are below t; t / 2^b is nearest to p."""
    for bits in (1, 8):
        if math.ldexp(p, bits).is_integer():
            return bits, int(math.ldexp(p, bits))
    return _MAX_BITS, min(round(math.ldexp(p, _MAX_BITS)), 2**_MAX_BITS - 1)


def _kept(generator: np.random.SFC64, count: int, bits: int, dropped: int) -> Tensor:
    """Return uint8 [count]: 1 where an element is kept, 0 where it is dropped."""
    raw = generator.random_raw(-(-count * bits // 64))
    if bits == 1:
        return torch.from_numpy(np.unpackbits(raw.view(np.uint8), count=count))
    numbers: Any = raw.view(np.uint8 if bits == 8 else np.uint16)[:count]
    return torch.from_numpy((numbers >= dropped).view(np.uint8))
