"""A sampler process: a copy of the fork server (dngd.sampling.fork_server) that serves one SamplerProcess.

It draws what it is asked for and knows nothing of epochs or shards. It ends when its request stream does, or
when its parent is gone. Its main thread is the first to use DGL's generator, which makes its stream the
canonical one (see sampler).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import NoReturn

PARENT_POLL_SECONDS = 1.0


def serve(requests: socket.socket, replies: socket.socket, files: Mapping[int, int], parent: int) -> int:
    """Answer requests until their stream ends; return the exit code.

    files: this process's numbers of the trainer's open files, by the trainer's. parent: the number of this one's.
    """
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()

    from dngd.errors import UserError
    from dngd.sampling import wire

    try:
        try:
            from dngd.sampling.draw import BatchDrawer
            from dngd.sampling.sampler import canonical

            setup, _ = wire.receive(requests)
            is_canonical = canonical()
            drawer = BatchDrawer.from_setup(setup, files)
        except ConnectionError:
            raise
        except UserError as error:
            wire.send(replies, {"kind": "refused", "text": str(error)})
            return 1
        except Exception:
            wire.send(replies, {"kind": "error", "request": -1, "traceback": traceback.format_exc()})
            return 1
        wire.send(replies, {"kind": "ready", "canonical": is_canonical})
        while True:
            request, (seeds, *excluded) = wire.receive(requests)
            try:
                header, arrays = drawer.draw(seeds, request["rng_seed"], request["slot"], *excluded)
            except Exception:
                failure = {"kind": "error", "request": request["request"]}
                wire.send(replies, {**failure, "traceback": traceback.format_exc()})
                continue
            wire.send(replies, {"kind": "batch", "request": request["request"], **header}, arrays)
    except ConnectionError:
        return 0


def leave(code: int) -> NoReturn:
    """End this process without DGL's and torch's teardown, which has nothing to save and can take long."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _leave_with_parent(parent: int) -> None:
    """End this process when its parent has ended.

    The end of the request stream says so too, but not while another process that the parent forked still
    holds the stream open.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(0)
