"""Page-locks host memory that exists already, so that a GPU copies from it on its own while the host goes on.

torch's pinned memory is allocated by torch; what sampler processes share with the trainer is not. It is registered with
the CUDA driver instead, mapping by mapping, and unregistered before it goes.
"""

from __future__ import annotations

import contextlib
import logging
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class HostRegistration(Protocol):
    """The driver's calls. register and unregister return 0 or an error's number."""

    def register(self, address: int, size: int) -> int: ...
    def unregister(self, address: int) -> int: ...
    def describe(self, error: int) -> str: ...


class CudaHostRegistration:
    """CUDA's, through torch's binding. device: one that this process uses."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, size: int) -> int:
        return self._checked(_runtime().cudaHostRegister(address, size, 0))

    def unregister(self, address: int) -> int:
        return self._checked(_runtime().cudaHostUnregister(address))

    def describe(self, error: int) -> str:
        return f"CUDA error {error}"

    def _checked(self, result: Any) -> int:
        error = int(result)
        if error:
            # CUDA keeps an error until it is asked for: the next kernel would raise it as its own. This one does.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device)
        return error


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class PageLockedMemory:
    """Keeps memory registered from `add` to `close`. Whoever copies from it ends before that.

        with PageLockedMemory(CudaHostRegistration(device)) as locked:
            SamplerPipeline(..., on_mapped=locked.add)

    What the driver refuses is left as it is, and said once: copies from there work, but make the host wait.
    """

    def __init__(self, driver: HostRegistration) -> None:
        self._driver = driver
        # The tensors keep the mappings: a registered address must not come to hold other memory.
        self._registered: list[Tensor] = []
        self._refused = False

    @property
    def num_bytes(self) -> int:
        """Bytes that are registered."""
        return sum(memory.numel() for memory in self._registered)

    def add(self, memory: Tensor) -> None:
        """Register a mapping: uint8 [size], from its first byte to its last."""
        if self._refused or memory.numel() == 0:
            return
        error = self._driver.register(memory.data_ptr(), memory.numel())
        if error:
            self._refused = True
            logger.warning(
                "the GPU's driver did not page-lock %d bytes that samplers share with the trainer (%s): copies from "
                "there to the GPU make the trainer wait",
                memory.numel(),
                self._driver.describe(error),
            )
            return
        self._registered.append(memory)

    def close(self) -> None:
        """Unregister all; idempotent."""
        registered, self._registered = self._registered, []
        for memory in registered:
            error = self._driver.unregister(memory.data_ptr())
            if error:
                logger.warning("the GPU's driver did not release page-locked memory (%s)", self._driver.describe(error))

    def __enter__(self) -> PageLockedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
