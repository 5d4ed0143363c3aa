"""What it costs to be watched: `python -m benchmarks.watching`.

A rank's part of it beside a step of 100 ms; a scrape of a machine with 8 ranks, and of a run of 100,000 steps; what the
page asks for; reading the whole record anew. Medians, and the 99th of a hundred.
"""

import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch

import made_record
from launcher.history.history import RunHistory
from launcher.monitor.monitor import Monitor
from launcher.node import exporter
from trainer.device import memory
from trainer.heartbeat import STEP_PHASES, Beat, Heartbeat, read

NUM_STEPS = 100_000
STEP_SECONDS = 0.1


def timed(what: str, do: Callable[[], object], times: int, *, of_step: bool = False) -> None:
    do()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        do()
        took.append(time.perf_counter() - began)
    worst = quantiles(took, n=100)[-1] if times >= 100 else max(took)
    share = f"   {median(took) / STEP_SECONDS:.4%} of a step of 100 ms" if of_step else ""
    print(f"{what:52} {1e3 * median(took):10.4f} ms {1e3 * worst:10.4f} ms{share}", flush=True)


def told_by_a_rank(folder: Path) -> Beat:
    """Times what a rank does for it in every step, with memory measured each time, though it is once a second."""
    heartbeat = Heartbeat(folder / "rank.beat")
    heartbeat.measure = partial(memory, torch.device("cpu"))

    def step() -> None:
        heartbeat._measured = -1e9
        for phase in STEP_PHASES:
            heartbeat.phase(phase)
        heartbeat.step_done(1)

    timed("a rank tells its phases, its step and its memory", step, 2000, of_step=True)
    beat = read(folder / "rank.beat")
    assert beat is not None
    return beat


def get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def main() -> None:
    print(f"{'':52} {'median':>13} {'99th, or worst':>13}")
    folder = Path(tempfile.mkdtemp(prefix="watching-", dir="/dev/shm"))
    try:
        beat = told_by_a_rank(folder)
        server = exporter.serve("127.0.0.1", 0, lambda: dict.fromkeys(range(8), beat))
        timed("a scrape of a machine with 8 ranks", lambda: get(f"http://127.0.0.1:{server.port}/metrics"), 200)
        server.close()
        run_dir = made_record.run_of(folder / "run", NUM_STEPS)
        timed(f"reading a record of {NUM_STEPS:,} steps", lambda: RunHistory.read(run_dir.events_path), 5)
        with closing(Monitor(run_dir.config(), run_dir, lambda *_, **__: None)) as monitor:
            get(f"{monitor.url}metrics")
            timed(f"a scrape of a run of {NUM_STEPS:,} steps", lambda: get(f"{monitor.url}metrics"), 200)
            assert monitor._watched is not None
            watched = monitor._watched

            def view() -> None:
                watched._viewed = -1e9
                watched.view()

            timed("what its page asks for once a second", view, 20)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
