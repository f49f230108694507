"""A sampler process: `python -m dngd.sampling.worker REQUEST_FD REPLY_FD`, started by dngd.sampling.process.

It draws what it is asked for and knows nothing of epochs or shards. It ends when its request stream does, or
when its parent is gone. Its main thread is the first to use DGL's generator, which makes its stream the
canonical one (see sampler).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback

PARENT_POLL_SECONDS = 1.0


def main(argv: list[str]) -> int:
    parent = os.getppid()
    # A terminal's Ctrl-C reaches this process too, but when to stop is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()
    requests, replies = (socket.socket(fileno=int(number)) for number in argv)

    from dngd.sampling import wire

    try:
        try:
            from dngd.sampling.draw import BatchDrawer
            from dngd.sampling.sampler import canonical

            setup, _ = wire.receive(requests)
            is_canonical = canonical()
            drawer = BatchDrawer.from_setup(setup)
        except ConnectionError:
            raise
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


def _leave_with_parent(parent: int) -> None:
    """End this process when its parent has ended.

    The end of the request stream says so too, but not while another process that the parent forked still
    holds the stream open.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips DGL's and torch's teardown, which has nothing to save and can take long.
    os._exit(code)
