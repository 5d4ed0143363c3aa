"""What ranks run in the launcher's tests, in place of `trainer.rank:main`; a fork server imports it by PYTHONPATH."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import psutil

from trainer.config import UserError
from trainer.rank_spec import RankSpec


def as_told(spec: RankSpec) -> None:
    """Do what the file `behaviour` in the run folder names."""
    globals()[(spec.run_dir / "behaviour").read_text()](spec)


def succeed(spec: RankSpec) -> None:
    print("printed")
    print("complained", file=sys.stderr)
    os.write(1, b"written past Python\n")
    seen = {**vars(spec), "pid": os.getpid(), "parent": os.getppid(), "cwd": os.getcwd(), "env": dict(os.environ)}
    (spec.run_dir / f"rank-{spec.rank}.json").write_text(json.dumps(seen, default=str))


def block(spec: RankSpec) -> None:
    _note_pid(spec)
    while True:
        signal.pause()


def second_raises(spec: RankSpec) -> None:
    _second_of_the_node(spec, _raise(ValueError("the batch is empty\nand this is the second line")))


def second_complains(spec: RankSpec) -> None:
    _second_of_the_node(spec, _raise(UserError("the corpus is too small for one batch; add text")))


def second_leaves(spec: RankSpec) -> None:
    _second_of_the_node(spec, lambda: os._exit(0))


def second_kills_the_fork_server(spec: RankSpec) -> None:
    _second_of_the_node(spec, lambda: os.kill(os.getppid(), signal.SIGKILL))
    signal.pause()


def second_dies_and_its_peers_lose_the_connection(spec: RankSpec) -> None:
    """As in a collective: the peers of a killed rank raise, and may be noticed before its death is."""
    path = str(spec.run_dir / "peers.sock")
    with socket.socket(socket.AF_UNIX) as peers:
        if spec.local_rank == 1:
            peers.bind(path)
            peers.listen()
            connections = [peers.accept()[0] for _ in range(spec.local_world_size - 1)]
            _note_pid(spec)
            _second_of_the_node(spec, lambda: os.kill(os.getpid(), signal.SIGKILL))
            assert not connections, "unreachable; the connections live until the process dies"
        _until(lambda: peers.connect_ex(path) == 0)
        _note_pid(spec)
        peers.recv(1)
        raise ConnectionError("connection closed by peer")


def find_predecessors_dead(spec: RankSpec) -> None:
    pids = [int(path.read_text()) for path in spec.run_dir.glob("pid-*")]
    assert len(pids) == spec.world_size
    alive = [pid for pid in pids if is_alive(pid)]
    assert not alive, f"ranks of the killed job are alive: {alive}"


def meet_at_rendezvous(spec: RankSpec) -> None:
    """As torch.distributed does at tcp://host:port: rank 0 listens, the others connect."""
    scheme, _, address = spec.rendezvous.partition("://")
    host, _, port = address.partition(":")
    assert scheme == "tcp"
    if spec.rank == 0:
        with socket.create_server((host, int(port))) as server:
            for _ in range(spec.world_size - 1):
                server.accept()[0].close()
    else:
        with socket.socket() as client:
            _until(lambda: client.connect_ex((host, int(port))) == 0)
    succeed(spec)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _second_of_the_node(spec: RankSpec, act: Callable[[], object]) -> None:
    """The second rank of each machine acts once the others are up, and says when; the others block."""
    if spec.local_rank != 1:
        block(spec)
    others = [rank for rank in range(spec.rank - 1, spec.rank - 1 + spec.local_world_size) if rank != spec.rank]
    _until(lambda: all((spec.run_dir / f"pid-{rank}").exists() for rank in others))
    (spec.run_dir / "acted-at").write_text(str(time.time()))
    act()


def _raise(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def _note_pid(spec: RankSpec) -> None:
    temporary = spec.run_dir / f".pid-{spec.rank}"
    temporary.write_text(str(os.getpid()))
    temporary.rename(spec.run_dir / f"pid-{spec.rank}")


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s in vain"
        time.sleep(0.005)
