"""Reading feature rows from the store's table into memory that is kept."""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureTable:
    """Rows of a feature table [N, F], gathered into a kept buffer.

    A fresh buffer a batch costs more in page faults than the gather itself. The first layer's mean need not
    gather at all: `torch.nn.functional.embedding_bag` reads `table` itself with a layer's global indices.
    """

    def __init__(self, features: Tensor, device: torch.device | str = "cpu") -> None:
        self.table = features
        self.device = torch.device(device)
        pin = self.device.type == "cuda"
        self._buffer = torch.empty((0, features.shape[1]), dtype=features.dtype, pin_memory=pin)

    def rows(self, node_ids: Tensor) -> Tensor:
        """Return features[node_ids] on the device: [n, F] for node_ids int64 [n].

        On the CPU the result is a view of the buffer: it is overwritten by the next call.
        """
        count = node_ids.shape[0]
        if self._buffer.shape[0] < count:
            shape = (max(count, 2 * self._buffer.shape[0]), self.table.shape[1])
            self._buffer = torch.empty(shape, dtype=self.table.dtype, pin_memory=self._buffer.is_pinned())
        rows = torch.index_select(self.table, 0, node_ids, out=self._buffer[:count])
        # Not non_blocking: the buffer is written again by the next call.
        return rows.to(self.device)
