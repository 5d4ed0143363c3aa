"""The network check where there is one machine: two processes on it, over loopback, with GPUs if there are two."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from launcher.doctor.checks import devices
from launcher.doctor.checks.network import TIMEOUT_SECONDS, Backend, Network
from launcher.job.session import session
from trainer.config import RunConfig, UserError

LONGEST_SECONDS = 3 * TIMEOUT_SECONDS  # importing torch from a cold disk, meeting, measuring
_PROGRAM = ["-P", "-m", "launcher.doctor.checks.network"]
_NUM_RANKS = 2
_POLL_SECONDS = 0.02


def measure(config: RunConfig | None) -> Network:
    """The processes are gone when this ends, however it ends: they live in a session.

    Raises:
        UserError: they have not met, or one has failed.
    """
    num_gpus = len(devices.measure().gpus)
    has_pair = devices.uses_gpus(config, num_gpus) and num_gpus >= _NUM_RANKS  # NCCL refuses two ranks on one GPU
    backend: Backend = "nccl" if has_pair else "gloo"
    one_thread = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    with session() as folder:
        env = {**os.environ, **one_thread, **(config.launch.env if config else {})}
        logs = [folder / f"rank-{rank}.log" for rank in range(_NUM_RANKS)]
        ranks = [_start(rank, backend, folder, log, env) for rank, log in enumerate(logs)]
        _wait(ranks, logs)
        return Network(**orjson.loads((folder / "network.json").read_bytes()))


def _start(rank: int, backend: str, folder: Path, log: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    told = [str(rank), str(_NUM_RANKS), f"file://{folder}/rendezvous", backend, str(folder / "network.json")]
    with open(log, "wb") as written:
        return subprocess.Popen(
            [sys.executable, *_PROGRAM, *told],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            env=env,
            start_new_session=True,  # Ctrl-C is for the command alone
        )


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Path]) -> None:
    """Raises:
    UserError: one has failed, or time has run out; all have ended.
    """
    deadline, failed = time.monotonic() + LONGEST_SECONDS - 10.0, None  # with time for the session to end
    try:
        while failed is None and any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            failed = next((number for number, rank in enumerate(ranks) if rank.poll()), None)
        is_late = any(rank.poll() is None for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if failed is None and not is_late:
        return
    reason = _last_line(logs[failed]) if failed is not None else "time ran out"
    raise UserError(
        f"two processes of this machine have not met over loopback ({reason}); see that the interface lo is up, that "
        "no firewall is on it, and what launch.env says of interfaces"
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "one was killed"
