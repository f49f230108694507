"""Runs a function on several real processes that form a gloo world, and checks every exit code."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120
END_SECONDS = 10


def run_ranks(
    function: str,
    world_size: int,
    arguments: list[Any],
    *,
    wait_limit_seconds: int = 60,
    limit_seconds: int = TIMEOUT_SECONDS,
) -> list[list[Any]]:
    """Return what `module:function(communicator, argument)` returns for each argument, on each rank in order.

    function: "tests.multiprocess.work:name". One set of processes does all the arguments, since starting one
    costs seconds. Arguments and results travel as JSON. wait_limit_seconds: of every collective. A rank that fails, or
    does not end within limit_seconds and then tells where its threads are, fails the test with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.helpers.ranks",
                    function,
                    str(rank),
                    str(world_size),
                    folder,
                    str(wait_limit_seconds),
                    str(limit_seconds),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(arguments))
            process.stdin.close()
            process.stdin = None
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=limit_seconds + END_SECONDS)[0])
        finally:
            for process in processes:
                process.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs)):
            assert process.returncode == 0, f"rank {rank} exited with {process.returncode}:\n{output[-3000:]}"
        by_rank = [json.loads((Path(folder) / f"result-{rank}").read_text()) for rank in range(world_size)]
        return [list(results) for results in zip(*by_rank)]


def _main() -> None:
    function, rank, world_size, folder, limit = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
    faulthandler.dump_traceback_later(int(sys.argv[6]), exit=True)
    arguments = json.load(sys.stdin)
    from dngd.comm import current_communicator, destroy_process_group, init_process_group

    if world_size > 1:
        init_process_group(rank, world_size, f"file://{folder}/rendezvous", timeout_seconds=limit)
    communicator = current_communicator(timeout_seconds=limit)
    module, _, name = function.partition(":")
    work = getattr(importlib.import_module(module), name)
    results = [work(communicator, argument) for argument in arguments]
    (Path(folder) / f"result-{rank}").write_text(json.dumps(results))
    if world_size > 1:
        communicator.barrier()
        destroy_process_group()
    # The results are there; a thread of gloo's that still runs would end the interpreter's own way out in an abort.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
