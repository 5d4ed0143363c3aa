"""A process that has imported all that a rank needs and forks the ranks of one machine from itself.

Importing torch, megatron-core and DeepSpeed takes seconds, forking takes milliseconds, so a job starts its ranks from
here. The process has one thread and no CUDA state, because a fork can copy neither; whoever spawns it may have both.

It is not the fork server of `multiprocessing`, whose children import the `__main__` of the process that asked for
them (in a Ray worker that is Ray, 1.4 s for four ranks on two cores) and which passes over a failed preload in
silence.

Nothing outlives its parent: the kernel kills the fork server with the process that spawned it, and the ranks with
the fork server, which also ends when its connection is closed.
"""

import faulthandler
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

from launcher.node import ownership
from launcher.node.forked_rank import Entry, ForkedRank, die_with, fork_rank, one_line
from trainer.rank_spec import RankSpec

Channel: TypeAlias = "Connection[Any, Any]"


@dataclass(frozen=True)
class ServerOptions:
    """What a fork server is told when it is spawned."""

    target: str
    """What a rank runs, `module:function`; the function takes the RankSpec."""
    logs: Path
    """Folder of rank-<rank>.log and node-<node>.log."""
    node: int
    """Index of the machine within the job."""
    lock: Path
    """The file of `launcher.node.ownership` that the server and its ranks hold."""
    job_id: str


@dataclass(frozen=True)
class Ready:
    """The first thing it says: the target is imported, or cannot be."""

    problem: str | None


@dataclass(frozen=True)
class Start:
    """Tells it to fork a rank per spec; it answers with a RankEnd per rank, in the order of their ends."""

    specs: Sequence[RankSpec]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Kill:
    """Tells it to kill the ranks that are alive."""


def spawn(options: ServerOptions, socket_path: Path, env: Mapping[str, str], cwd: str) -> subprocess.Popen[bytes]:
    """Start a fork server, which begins to import, and accepts one connection on a Unix socket from now on.

    The kernel kills it with the calling thread, which must therefore be one that lasts.
    """
    with socket.socket(socket.AF_UNIX) as listener, open(options.logs / f"node-{options.node}.log", "ab") as log:
        listener.bind(str(socket_path))
        listener.listen(1)
        told = json.dumps({**vars(options), "logs": str(options.logs), "lock": str(options.lock)})
        program = ["-P", "-c", "from launcher.node.fork_server import serve; serve()"]
        return subprocess.Popen(
            [sys.executable, *program, told, str(os.getpid()), str(listener.fileno())],
            pass_fds=(listener.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **env},
            cwd=cwd,
            start_new_session=True,  # Ctrl-C is for the driver alone
        )


def connect(socket_path: Path) -> Channel:
    """The channel for `Start` and `Kill`, on which come `Ready` and `RankEnd`s."""
    return Client(str(socket_path), family="AF_UNIX")


def serve() -> None:
    """The whole life of the fork server process."""
    told, parent, listener_fd = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = ServerOptions(**{**told, "logs": Path(told["logs"]), "lock": Path(told["lock"])})
    die_with(parent)
    faulthandler.enable()
    if ownership.hold(options.lock, options.job_id) is None:
        return
    entry, problem = _preload(options.target)
    gc.freeze()  # a collection in a rank would write to, and so copy, every page shared with the others
    with socket.socket(fileno=listener_fd) as listener:
        accepted, _ = listener.accept()
    channel: Channel = Connection(accepted.detach())
    channel.send(Ready(problem))
    _obey(channel, entry, options.logs)


def _preload(target: str) -> tuple[Entry, str | None]:
    """The target, and why it cannot be used."""

    def missing(spec: RankSpec) -> None:
        raise AssertionError(f"{target} was not imported")

    module, _, function = target.partition(":")
    started = time.monotonic()
    try:
        entry = getattr(importlib.import_module(module), function)
        print(f"imported {module} in {time.monotonic() - started:.1f} s", flush=True)
    except BaseException as error:  # an import may do anything, SystemExit included
        traceback.print_exc()
        return missing, f"importing {target} failed with {one_line(error)}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return missing, f"importing {module} initialises CUDA, which no forked rank could use; leave that to the rank"
    if len(os.listdir("/proc/self/task")) > 1:
        print(f"warning: importing {module} starts threads; forked ranks are without them", file=sys.stderr, flush=True)
    return entry, None


def _obey(channel: Channel, entry: Entry, logs: Path) -> None:
    """Fork, reap and kill ranks as told, until the channel is closed."""
    running: dict[int, ForkedRank] = {}
    while True:
        for ready in wait([channel, *running]):
            if isinstance(ready, int):
                channel.send(running.pop(ready).reap())
                continue
            try:
                message = channel.recv()
            except EOFError:
                message = None
            if isinstance(message, Start):
                forked = [fork_rank(spec, entry, message.env, logs) for spec in message.specs]
                running |= {rank.fileno(): rank for rank in forked}
                continue
            for rank in running.values():
                rank.kill()
            if message is None:
                return
