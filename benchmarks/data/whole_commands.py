"""Whole commands, from jsonl to a Megatron .bin/.idx with the same tokenizer, start-up and imports included."""

import importlib.util
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
import yaml

from benchmarks.data import process_tree
from benchmarks.data.corpus import VOCAB_SIZE, Corpus
from benchmarks.data.peers import NUM_CORES
from benchmarks.data.process_tree import Cost

_ROOT = Path(__file__).resolve().parents[2]
_HELDOUT_FRACTION = 1e-4  # a few documents: a preparation holds some out, always


@dataclass(frozen=True)
class Contestant:
    name: str
    run: Callable[[Path], Cost]
    """Writes into an empty folder."""
    outputs: Callable[[Path], list[Path]]
    """Prefixes of the .bin/.idx that it wrote, in order; ours has what is held out last."""
    is_quick: bool
    """Takes part in every round; the others seldom."""


def compare(corpus: Corpus, scratch: Path, rounds: int, slow_rounds: int, megatron: Path | None) -> None:
    contestants = [*ours(corpus, scratch), *peers(corpus, scratch)]
    if megatron:
        contestants += megatron_commands(corpus, megatron)
    else:
        print("Megatron-LM's commands: no --megatron DIR given, left out")
    costs: dict[str, list[Cost]] = {each.name: [] for each in contestants}
    digests: dict[str, list[list[bytes]]] = {}
    for contestant in in_turns(contestants, rounds, slow_rounds):
        folder = scratch / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            costs[contestant.name].append(contestant.run(folder))
        except RuntimeError as error:
            print(f"{contestant.name} failed: {error}")
            continue
        if contestant.name not in digests:
            digests[contestant.name] = [document_digests(prefix) for prefix in contestant.outputs(folder)]
    shutil.rmtree(scratch / "out", ignore_errors=True)
    show(corpus, costs, digests)


def in_turns(contestants: list[Contestant], rounds: int, slow_rounds: int) -> list[Contestant]:
    """The quick ones, then one slow one, and again; what slow ones remain come at the end."""
    quick = [each for each in contestants if each.is_quick]
    slow = slow_rounds * [each for each in contestants if not each.is_quick]
    order: list[Contestant] = []
    for number in range(max(rounds, len(slow))):
        order += quick if number < rounds else []
        order += slow[number : number + 1]
    return order


# --------------------------------------------------------------------------------------------------------- contestants


def ours(corpus: Corpus, scratch: Path) -> list[Contestant]:
    return [
        Contestant("ours", _our_command(corpus, scratch, "auto", NUM_CORES), _our_outputs, True),
        Contestant("ours, one worker", _our_command(corpus, scratch, "auto", 1), _our_outputs, True),
        Contestant(
            "ours, reference engine", _our_command(corpus, scratch, "reference", NUM_CORES), _our_outputs, False
        ),
    ]


def _our_command(corpus: Corpus, scratch: Path, engine: str, workers: int) -> Callable[[Path], Cost]:
    config = scratch / f"prepare-{engine}.yaml"
    tree = {
        "name": "benchmark",
        "model": {"vocab_size": VOCAB_SIZE, "seq_length": 8, "num_layers": 1, "hidden_size": 64, "num_heads": 1},
        "data": {
            "sources": str(corpus.jsonl),
            "dedup": {"exact": False},
            "heldout_fraction": _HELDOUT_FRACTION,
            "tokenizer": {"path": str(corpus.tokenizer), "engine": engine},
        },
    }
    config.write_text(yaml.safe_dump(tree))
    main = "from launcher.cli.main import main; main()"
    command = [sys.executable, "-c", main, "prepare", str(config), "--workers", str(workers), "--out"]
    return lambda folder: process_tree.run([*command, str(folder / "data")], {"PYTHONPATH": str(_ROOT)})


def _our_outputs(folder: Path) -> list[Path]:
    return [folder / "data" / "text" / "train", folder / "data" / "text" / "heldout"]


def peers(corpus: Corpus, scratch: Path) -> list[Contestant]:
    found = [
        Contestant(name, _peer_command(name, [corpus.jsonl], corpus), lambda folder: [folder / "text"], False)
        for name in ("datasets.map", "tokenizers loop")
    ]
    if importlib.util.find_spec("datatrove"):
        halves = _halves(corpus, scratch)
        found.append(Contestant("datatrove", _peer_command("datatrove", halves, corpus), _numbered_outputs, False))
    else:
        print("datatrove is not installed, left out")
    return found


def _peer_command(name: str, sources: list[Path], corpus: Corpus) -> Callable[[Path], Cost]:
    module = [sys.executable, "-W", "ignore", "-m", "benchmarks.data.peers", name]
    inputs = ["--tokenizer", str(corpus.tokenizer), "--sources", *map(str, sources)]
    return lambda folder: process_tree.run(
        [*module, *inputs, "--prefix", str(folder / "text")], {"PYTHONPATH": str(_ROOT)}
    )


def _halves(corpus: Corpus, scratch: Path) -> list[Path]:
    """The corpus as one file a core: datatrove shares out whole files."""
    lines, paths = corpus.jsonl.read_bytes().splitlines(keepends=True), []
    for number in range(NUM_CORES):
        path = scratch / f"part-{number}.jsonl"
        path.write_bytes(b"".join(lines[number * len(lines) // NUM_CORES : (number + 1) * len(lines) // NUM_CORES]))
        paths.append(path)
    return paths


def _numbered_outputs(folder: Path) -> list[Path]:
    return [path.with_suffix("") for path in sorted(folder.glob("*.bin"))]


def megatron_commands(corpus: Corpus, checkout: Path) -> list[Contestant]:
    """Megatron-LM's tools, from a checkout of it."""
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(corpus.tokenizer)]
    inputs = ["--input", str(corpus.jsonl), "--append-eod", *tokenizer]

    def command(script: str, *more: str) -> Callable[[Path], Cost]:
        start = [sys.executable, "-W", "ignore", str(checkout / "tools" / script), *inputs, *more]
        return lambda folder: process_tree.run(
            [*start, "--output-prefix", str(folder / "text")],
            {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])},
        )

    def outputs(folder: Path) -> list[Path]:
        return [folder / "text_text_document"]

    found = []
    if (checkout / "tools" / "preprocess_data_fast.py").exists():
        fast = command("preprocess_data_fast.py", "--use-gigatoken")
        found.append(Contestant("Megatron-LM, fast", fast, outputs, True))
    slow = command("preprocess_data.py", "--workers", str(NUM_CORES))
    return [*found, Contestant("Megatron-LM", slow, outputs, False)]


# ------------------------------------------------------------------------------------------------------------- results


def document_digests(prefix: Path) -> list[bytes]:
    """A hash of the token ids of every document, in order; the .idx is read as `data_pipeline.shards` describes it."""
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(34)
        itemsize = {4: 4, 8: 2}[header[17]]
        num_sequences = int.from_bytes(header[18:26], "little")
        lengths = np.fromfile(file, "<i4", num_sequences)
    with open(f"{prefix}.bin", "rb") as tokens:
        found = [xxhash.xxh3_128_digest(tokens.read(length * itemsize)) for length in lengths.tolist()]
        assert not tokens.read(1), f"{prefix}.bin holds more than its index says"
    return found


def verdict(mine: list[list[bytes]], theirs: list[bytes]) -> str:
    """Whether the same documents have the same tokens, in the same order: ours trained on and held out, theirs."""
    train, heldout = mine
    num_equal = (Counter(train + heldout) & Counter(theirs)).total()
    if not num_equal == len(theirs) == len(train) + len(heldout):
        return f"{num_equal:,} of {len(theirs):,} documents equal"
    left = set(heldout)
    in_order = [digest for digest in theirs if digest not in left] == [digest for digest in train if digest not in left]
    return "equal" if in_order else "equal but for the order"


def show(corpus: Corpus, costs: dict[str, list[Cost]], digests: dict[str, list[list[bytes]]]) -> None:
    megabytes = corpus.jsonl.stat().st_size / 1e6
    mine = digests["ours"]
    print(f"jsonl of {megabytes:.0f} MB to .bin/.idx, whole commands, {NUM_CORES} cores; memory: sum of PSS, sampled,")
    print("and the peak of the largest process; tokens against ours, document by document")
    print(
        f"{'':24}{'wall s':>8}{'(from, to)':>16}{'CPU s':>8}{'MB/s':>7}{'/ ours':>8}{'tree MB':>9}{'one MB':>8}  tokens"
    )
    base = statistics.median(cost.wall_seconds for cost in costs["ours"])
    for name, found in costs.items():
        if not found:
            continue
        walls = [cost.wall_seconds for cost in found]
        wall = statistics.median(walls)
        cpu = statistics.median(cost.cpu_seconds for cost in found)
        tree, one = max(cost.peak_tree_mb for cost in found), max(cost.peak_process_mb for cost in found)
        spread = f"({min(walls):.2f}, {max(walls):.2f})"
        equal = verdict(mine, [digest for part in digests[name] for digest in part])
        print(
            f"{name:24}{wall:8.2f}{spread:>16}{cpu:8.1f}{megabytes / wall:7.1f}{wall / base:8.1f}{tree:9.0f}{one:8.0f}"
            f"  {equal}"
        )
    documents, heldout = (len(part) for part in mine)
    print(f"ours holds {heldout} of {documents + heldout:,} documents out, in files of their own")
