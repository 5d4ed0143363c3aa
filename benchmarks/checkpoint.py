"""Saving and loading checkpoints: `make bench-checkpoint`.

Two ranks (data parallel, ZeRO-1) train GPT-2 small's width; ways to save take turns in the same processes:

1. Stall: for how long a save holds training up. Ours with the checkpoint service, ours while training waits, and
   `torch.distributed.checkpoint.async_save` of the same tensors. Beside it, what the steps take that run while the
   service writes, against those that run while it does not.
2. Writing: a rank's file from memory to the disk as the service does it, and `dd` with fsync through the page cache
   and past it, the same file and disk, taking turns.
3. Loading the state at the same layout (each rank reads its own file) and at another (tensor parallel 2), with the
   hashes checked and without.
4. Memory: of the ranks while they save, and of the service.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from launcher.node import ownership
from launcher.node.checkpoint_process import ServiceKeeper, ServiceOptions
from trainer import config_file, device, parallel
from trainer.checkpoint import sharded
from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.disk import copy_durably
from trainer.checkpoint.format.manifest import Manifest, read_manifest
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.service.room import Room
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.engine.engine import Engine
from trainer.events import read_events
from trainer.pipeline import MicroBatch
from trainer.run_dir import RunDir

NUM_RANKS = 2
LAYOUTS: dict[str, dict[str, Any]] = {"same layout": {"data": NUM_RANKS}, "another layout": {"tensor": NUM_RANKS}}
WAYS = ("service", "waiting", "DCP async_save")


@dataclass(frozen=True)
class Place:
    """Where a benchmark works."""

    run_dir: RunDir
    room: Path
    peer: Path


def config_of(layout: dict[str, Any], num_layers: int, snapshots_in: str) -> RunConfig:
    return from_tree(
        {
            "preset": "gpt2_small",
            "model": {"num_layers": num_layers, "seq_length": 256, "dropout": 0.0, "vocab_size": 8192},
            "train": {"global_batch_size": 4, "micro_batch_size": 1, "precision": "bf16"},
            "parallel": layout,
            "checkpoint": {"keep_last": 1, "snapshots_in": snapshots_in},
        }
    )


def ignore(*_: object, **__: object) -> None:
    """Events of the ranks: the service's alone are read."""


# -------------------------------------------------------------------------------------------------------------- a rank


class BenchRank:
    """What one rank is told to do, by name."""

    def __init__(self, config: RunConfig, rank: int, rendezvous: str, place: Place) -> None:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), LOCAL_WORLD_SIZE=str(NUM_RANKS)
        )
        target = device.activate("cpu")
        parallel.initialize(config.parallel, "cpu", rendezvous, rank, NUM_RANKS)
        self.config, self.rank, self.place = config, rank, place
        self.engine = Engine(config, target)
        self.engine.state.reset()
        shape = (4 // config.parallel.data, config.model.seq_length + 1)
        self.batch = [MicroBatch(part) for part in torch.randint(0, config.model.vocab_size, shape).split(1)]
        room = Room(place.room, range(NUM_RANKS))
        self.savers = {
            "service": Saver(self.engine, place.run_dir.checkpoints, room, ignore),
            "waiting": Saver(self.engine, place.run_dir.checkpoints, None, ignore),
        }

    def step(self) -> float:
        started = time.perf_counter()
        self.engine.train_step(self.batch, 1e-4, 0)
        return time.perf_counter() - started

    def save(self, way: str, number: int) -> float:
        if way in self.savers:
            facts = Manifest(number, number, self.config.model_dump(mode="json"))
            stall = self.savers[way].save(facts, must=True)
            assert stall is not None
            return stall
        tensors = {
            f"{self.rank}/{number}/{kind}": tensor
            for number, fragment in enumerate(self.engine.state.fragments())
            for kind, tensor in fragment.tensors.items()
        }
        started = time.perf_counter()
        self.saving = dcp.async_save(tensors, checkpoint_id=self.place.peer / f"{number}")
        return time.perf_counter() - started

    def wait_for_peer(self) -> float:
        self.saving.result()
        return 0.0

    def load(self, checkpoint: Path, verify: bool) -> float:
        started = time.perf_counter()
        if verify:
            names = sorted(read_manifest(checkpoint).files)
            store.verify(checkpoint, names[self.rank :: NUM_RANKS])
        sharded.load(self.engine, checkpoint)
        parallel.sum_over_ranks(0)
        return time.perf_counter() - started

    def memory_mb(self, key: str) -> float:
        """VmHWM or VmRSS, in MB."""
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 1024


def rank_process(config: RunConfig, rank: int, rendezvous: str, place: Place, orders: Connection) -> None:
    """Do as told until told nothing more."""
    bench = BenchRank(config, rank, rendezvous, place)
    orders.send(0.0)
    while (order := orders.recv()) is not None:
        name, *arguments = order
        orders.send(getattr(bench, name)(*arguments))
    os._exit(0)


class Ranks:
    """The ranks of one layout; an order goes to all, and the slowest answer counts."""

    def __init__(self, config: RunConfig, place: Place, scratch: Path) -> None:
        context, self._ends = multiprocessing.get_context("spawn"), []
        rendezvous = f"file://{scratch}/rendezvous-{time.monotonic_ns()}"
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            context.Process(target=rank_process, args=(config, rank, rendezvous, place, theirs), daemon=True).start()
            self._ends.append(ours)
        for end in self._ends:
            end.recv()

    def do(self, name: str, *arguments: object) -> float:
        for end in self._ends:
            end.send((name, *arguments))
        return max(end.recv() for end in self._ends)

    def end(self) -> None:
        for end in self._ends:
            end.send(None)


# ------------------------------------------------------------------------------------------------------------ measuring


def spread(values: list[float], unit: str = "s") -> str:
    return f"{statistics.median(values):.3f} {unit} ({min(values):.3f} to {max(values):.3f}, {len(values)} times)"


def compare_stalls(ranks: Ranks, place: Place, rounds: int) -> None:
    stalls: dict[str, list[float]] = {way: [] for way in WAYS}
    beside: dict[str, list[float]] = {way: [] for way in WAYS}
    alone: list[float] = []
    number = 0
    for turn in range(rounds + 1):
        for way in WAYS:
            number += 1
            quiet = [ranks.do("step") for _ in range(2)]
            stall = ranks.do("save", way, number)
            disturbed = []
            while True:
                disturbed.append(ranks.do("step"))
                if way == "service" and not saved(place, number):
                    continue
                break
            if way == "DCP async_save":
                ranks.do("wait_for_peer")
            if turn:  # the first round makes the pages and warms the caches
                stalls[way].append(stall)
                alone += quiet
                beside[way].append(disturbed[0])
    print(f"a step while nothing is saved: {spread(alone)}")
    for way in WAYS:
        print(f"{way:15s} stall {spread(stalls[way])}; the step after it {statistics.median(beside[way]):.3f} s")
    ratio = statistics.median(stalls["service"]) / statistics.median(stalls["waiting"])
    peer = statistics.median(stalls["service"]) / statistics.median(stalls["DCP async_save"])
    print(f"stall with the service: {ratio:.3f} of waiting, {peer:.3f} of async_save")
    print(
        f"memory of a rank: {ranks.do('memory_mb', 'VmHWM'):.0f} MB at most, {ranks.do('memory_mb', 'VmRSS'):.0f} now"
    )


def saved(place: Place, step: int) -> bool:
    return (place.run_dir.checkpoints / store.folder_name(step) / "manifest.json").exists()


def compare_writing(source: Path, folder: Path, rounds: int) -> None:
    """MB/s of the same file from memory to disk."""
    target = folder / "written"

    def dd(*flags: str) -> Callable[[], object]:
        command = ["dd", f"if={source}", f"of={target}", "bs=8M", "conv=fsync", *flags]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: copy_durably(source, target),
        "dd": dd(),
        "dd past the page cache": dd("oflag=direct"),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, write in ways.items():
            target.unlink(missing_ok=True)
            os.sync()
            started = time.perf_counter()
            write()
            rates[name].append(source.stat().st_size / 1e6 / (time.perf_counter() - started))
    target.unlink()
    for name, found in rates.items():
        print(f"writing, {name:22s} {spread(found, 'MB/s')}")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name in list(medians)[1:]:
        print(f"ours is {medians['ours'] / medians[name]:.2f} of {name}")


def compare_loading(num_layers: int, place: Place, scratch: Path, checkpoint: Path, rounds: int) -> None:
    megabytes = read_manifest(checkpoint).num_bytes / 1e6
    for layout, parallel_layout in LAYOUTS.items():
        ranks = Ranks(config_of(parallel_layout, num_layers, str(place.room)), place, scratch)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for verify in times:
                times[verify].append(ranks.do("load", checkpoint, verify))
        ranks.end()
        for verify, seconds in times.items():
            rate = megabytes / statistics.median(seconds)
            print(
                f"loading, {layout}, {'hashes checked' if verify else 'unchecked'}: {spread(seconds)}, {rate:.0f} MB/s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of 768 elements; 12 make a state of 1.1 GB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--disk", default=".", help="folder to write to")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.disk) as disk,
        tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir="/dev/shm") as memory,
    ):
        scratch = Path(disk)
        place = Place(RunDir(scratch / "run"), Path(memory) / "room", scratch / "peer")
        config = config_of(LAYOUTS["same layout"], options.layers, memory)
        place.run_dir.create(config)
        lock = scratch / "lock"
        ownership.claim(lock, "bench", 1.0)
        service = ServiceKeeper(
            ServiceOptions(
                room=str(place.room),
                run_dir=str(place.run_dir.path),
                config_yaml=config_file.dump(config),
                first_rank=0,
                num_ranks=NUM_RANKS,
                node=0,
                num_nodes=1,
                lock=str(lock),
                job_id="bench",
            ),
            scratch / "service.log",
            os.getcwd(),
        )
        service.start()
        ranks = Ranks(config, place, scratch)
        compare_stalls(ranks, place, options.rounds)
        ranks.do("save", "service", 10**6)
        ranks.end()
        while not saved(place, 10**6):
            time.sleep(0.1)
        events = [event for event in read_events(place.run_dir.events_path) if event["kind"] == "checkpoint_saved"]
        written = [event["bytes"] / 1e6 / event["seconds"] for event in events]
        print(f"the service, to commit, written and read back: {spread(written, 'MB/s')}, {events[0]['bytes']:,} bytes")
        checkpoint = place.run_dir.checkpoints / store.folder_name(10**6)
        source = place.room / store.folder_name(10**6) / file_name(0)
        compare_writing(source, scratch, options.rounds)
        compare_loading(options.layers, place, scratch, checkpoint, options.rounds)
        service.drain()


if __name__ == "__main__":
    main()
