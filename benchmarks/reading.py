"""Reading training samples beside megatron-core's own data sets: `python -m benchmarks.reading`.

1. Samples of 2,048 tokens per second of a core's time, from the page cache: five data sets blended as GPT-3's, ours
   in batches of 512 as a rank reads them, megatron-core's BlendedDataset of GPTDatasets item by item (a loader would
   still have to collate them); the same shards, taking turns. And what each built before its first sample.
2. Windows per second, by the clock, from shards that are not in the page cache: by system call as we read them, and
   through a memory map.
3. Going on at sample 1,000,000,000: opening the shards and reading one batch, beside the same at sample 0.
4. Memory of a rank on a million and on a billion documents, in processes of their own. The shards are simulated:
   sparse files in which only what opening them reads is written.
"""

import argparse
import multiprocessing
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.shards import ShardWriter, TokenBatch
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.data import blend as blends
from trainer.data.batches import TrainingData
from trainer.data.prepared import PreparedFolder
from trainer.data.shards import Shard
from trainer.data_config import BLENDS

SEQ_LENGTH, BATCH, VOCAB = 2048, 512, 50257
DOCUMENT_TOKENS = 1000
FAR = 10**9  # samples; 2T tokens
WEIGHTS = BLENDS["gpt3"]


def config() -> RunConfig:
    return from_tree(
        {
            "model": {"seq_length": SEQ_LENGTH},
            "train": {"global_batch_size": BATCH},
            "data": {"prepared": "a temporary folder", "blend": "gpt3"},
        }
    )


def write_shards(folder: Path, num_documents: int) -> PreparedFolder:
    draw = np.random.default_rng(1)
    for name in WEIGHTS:
        (folder / name).mkdir()
        with ShardWriter(folder / name / "train", VOCAB, end_of_text_id=VOCAB - 1) as writer:
            drawn = draw.integers(0, VOCAB - 1, (num_documents, DOCUMENT_TOKENS - 1)).astype(np.uint16)
            writer.add(TokenBatch.of(list(drawn)))
            writer.finish()
            writer.commit()
    return PreparedFolder(folder, {name: folder / name for name in WEIGHTS})


def simulate_shards(folder: Path, num_documents: int) -> PreparedFolder:
    """Sparse shards of one data set; the .idx holds its header and its last length and offset alone."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1)
    with open(folder / "train.idx", "wb") as idx:
        idx.write(header)
        idx.seek(len(header) + 4 * (num_documents - 1))
        idx.write(struct.pack("<i", DOCUMENT_TOKENS))
        idx.seek(len(header) + 4 * num_documents + 8 * (num_documents - 1))
        idx.write(struct.pack("<q", 2 * DOCUMENT_TOKENS * (num_documents - 1)))
        idx.truncate(len(header) + 12 * num_documents + 8 * (num_documents + 1))
    with open(folder / "train.bin", "wb") as bin_:
        bin_.truncate(2 * DOCUMENT_TOKENS * num_documents)
    return PreparedFolder.open(folder)


# --------------------------------------------------------------------------------------------------------------- speed


def our_batches(folder: PreparedFolder) -> Iterator[int]:
    """Reads a batch for every `next`, and gives its number of samples."""
    samples, step = TrainingData.open(folder, config()), 0
    while True:
        yield len(samples.replica_tokens(step * BATCH, BATCH, 0))
        step += 1


def megatron_items(folder: PreparedFolder, cache: Path, num_samples: int) -> Iterator[int]:
    """megatron-core's, as its own training builds them; a BlendedDataset asks for the rank when it builds an index."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer: Any = SimpleNamespace(vocab_size=VOCAB, eod=VOCAB - 1, unique_identifiers={"class": "none"})
    settings = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend=([str(place / "train") for place in folder.datasets.values()], list(WEIGHTS.values())),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    items, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, settings).build()
    assert items is not None
    while True:
        for number in range(num_samples):
            items[number]
            yield 1


def samples_per_second(reads: Iterator[int], num_samples: int) -> float:
    """Of processor time, all threads and the kernel's part included; what else runs on the machine counts less."""
    started, done = time.process_time(), 0
    while done < num_samples:
        done += next(reads)
    return done / (time.process_time() - started)


def compare_speed(folder: PreparedFolder, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        contestants: dict[str, tuple[Callable[[], Iterator[int]], int]] = {
            "ours": (lambda: our_batches(folder), 64 * BATCH),
            "megatron-core": (lambda: megatron_items(folder, Path(cache), 100_000), 4096),
        }
        reads, built_in_seconds = {}, {}
        for name, (build, _) in contestants.items():
            started = time.perf_counter()
            reads[name] = build()
            next(reads[name])
            built_in_seconds[name] = time.perf_counter() - started
        index_bytes = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for round_number in range(rounds + 1):
            for name, (_, num_samples) in contestants.items():
                rate = samples_per_second(reads[name], num_samples)
                if round_number:  # the first round warms up
                    rates[name].append(rate)
    print(f"samples of {SEQ_LENGTH} tokens per processor second, five data sets, median of {rounds} rounds (from, to)")
    for name, found in rates.items():
        spread = f"({min(found):,.0f} to {max(found):,.0f})"
        print(
            f"{name:14}{statistics.median(found):9,.0f}  {spread:24} first sample after {built_in_seconds[name]:.2f} s"
        )
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["megatron-core"], strict=True)]
    print(f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    print(f"index on disk for 100,000 samples: ours none, megatron-core {index_bytes / 1e6:.1f} MB")


def compare_cold(prefix: Path, rounds: int, num_windows: int = 300) -> None:
    """On 400 MB: of much less, a map has soon read all, which real data sets do not let it."""
    with ShardWriter(prefix, VOCAB, end_of_text_id=VOCAB - 1) as writer:
        for _ in range(20):
            writer.add(TokenBatch.of([np.arange(10_000_000).astype(np.uint16)]))
        writer.finish()
        writer.commit()
    shard = Shard(prefix)
    window, rates = np.empty(SEQ_LENGTH + 1, shard.dtype), {"system calls": list[float](), "memory map": list[float]()}
    draw = np.random.default_rng(2)
    for _ in range(rounds):
        for name, found in rates.items():
            forget(prefix.with_name(f"{prefix.name}.bin"))
            tokens = shard.mapped()  # anew: what is mapped is not forgotten
            starts = draw.integers(0, shard.num_tokens - SEQ_LENGTH, num_windows).tolist()
            started = time.perf_counter()
            for start in starts:
                if name == "memory map":
                    window[:] = tokens[start : start + SEQ_LENGTH + 1]
                else:
                    shard.read(start, window)
            found.append(num_windows / (time.perf_counter() - started))
    print(f"\nwindows per second that are not in the page cache, median of {rounds} rounds (least to most)")
    for name, found in rates.items():
        print(f"{name:14}{statistics.median(found):9,.0f}  ({min(found):,.0f} to {max(found):,.0f})")


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -------------------------------------------------------------------------------------------------- resuming and memory


def measure_resuming(folder: PreparedFolder, rounds: int) -> None:
    seconds: dict[int, list[float]] = {0: [], FAR: []}
    for _ in range(rounds):
        for position, found in seconds.items():
            blends._layout.cache_clear()
            started = time.perf_counter()
            TrainingData.open(folder, config()).replica_tokens(position, BATCH, 0)
            found.append(time.perf_counter() - started)
    print(f"\nopening the data and reading a batch of {BATCH}, median of {rounds} rounds (least to most)")
    for position, found in seconds.items():
        print(f"at sample {position:13,}: {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})")


def memory(num_documents: int, answer: Connection) -> None:
    """Private bytes, and seconds, that opening the data and reading 20 batches from all over it take."""
    torch.set_num_threads(1)
    settings = from_tree({"model": {"seq_length": SEQ_LENGTH}, "train": {"global_batch_size": BATCH}})
    with tempfile.TemporaryDirectory() as folder:
        prepared = simulate_shards(Path(folder), num_documents)
        before, started = _private_bytes(), time.perf_counter()
        samples = TrainingData.open(prepared, settings)
        for step in range(20):
            samples.replica_tokens(step * BATCH, BATCH, 0)
        answer.send((_private_bytes() - before, time.perf_counter() - started))


def _private_bytes() -> int:
    """Resident memory without the pages of mapped files, which the kernel takes back when it needs them."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def measure_memory(num_documents: int) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=memory, args=(num_documents, theirs))
    process.start()
    num_bytes, seconds = ours.recv()
    process.join()
    tokens = num_documents * DOCUMENT_TOKENS
    print(f"{num_documents:13,} documents, {tokens:17,} tokens: {num_bytes / 1e6:5.1f} MB, {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--documents", type=int, default=20_000, help="in each of the five data sets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        dist.init_process_group("gloo", init_method=f"file://{temporary}/rendezvous", rank=0, world_size=1)
        folder = write_shards(Path(temporary), arguments.documents)
        compare_speed(folder, arguments.rounds)
        compare_cold(Path(temporary) / "cold", arguments.rounds)
        measure_resuming(folder, arguments.rounds)
        dist.destroy_process_group()
    print("\nprivate memory of opening the data and reading 20 batches (the layout of the blend, and one batch)")
    for num_documents in (10**6, 10**9):
        measure_memory(num_documents)


if __name__ == "__main__":
    main()
