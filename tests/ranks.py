"""Runs a function on N gloo ranks, forked from this process, which has imported everything: a second for eight."""

import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import device, parallel
from trainer.config import RunConfig

RankFunction = Callable[[RunConfig, torch.device], Any]


def run_on_ranks(config: RunConfig, function: RankFunction, timeout_seconds: float = 120) -> list[Any]:
    """Call `function(config, device)` on every rank of the config's layout; returns what each rank returned.

    Raises:
        AssertionError: a rank failed or time ran out; carries the end of the first failed rank's output.
    """
    world_size = config.parallel.num_ranks
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sys.stdout.flush()
        sys.stderr.flush()
        pids = [os.fork() or _child(config, function, rank, world_size, scratch) for rank in range(world_size)]
        failed = _wait(pids, time.monotonic() + timeout_seconds)
        if failed is not None:
            log = (scratch / f"log{failed}").read_text(errors="replace")
            raise AssertionError(f"rank {failed} of {world_size} failed or hung:\n{log[-4000:]}")
        return [pickle.loads((scratch / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _child(config: RunConfig, function: RankFunction, rank: int, world_size: int, scratch: Path) -> int:
    """The whole life of a rank; never returns into the parent's test."""
    status = 1
    gc.freeze()  # or every collection here walks a million objects of the parent, and copies the pages they are on
    try:
        with open(scratch / f"log{rank}", "wb", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
        )
        torch.set_num_threads(1)
        target = device.activate("cpu")
        parallel.initialize(config.parallel, "cpu", f"file://{scratch}/rendezvous", rank, world_size)
        result = function(config, target)
        (scratch / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # a rank that leaves early tears connections down under the others
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int], deadline: float) -> int | None:
    """Wait for all; on the first failure or at the deadline kill the rest. Returns the rank at fault, if any."""
    running = dict(enumerate(pids))
    failed: int | None = None
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                failed = rank if status and failed is None else failed
        if running and (failed is not None or time.monotonic() > deadline):
            failed = next(iter(running)) if failed is None else failed
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    return failed
