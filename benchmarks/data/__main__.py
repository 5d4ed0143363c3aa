"""The data pipeline beside other tools, on real text: `make bench-data`."""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.data import decontamination, deduplication, filters, scaling, wet, whole_commands
from benchmarks.data.corpus import Corpus, make_corpus

Row = Callable[[Corpus, Path, argparse.Namespace], None]

ROWS: dict[str, Row] = {
    "commands": lambda corpus, scratch, given: whole_commands.compare(
        corpus, scratch, given.rounds, given.slow_rounds, given.megatron
    ),
    "minhash": lambda corpus, scratch, given: deduplication.compare(corpus, given.rounds),
    "decontamination": lambda corpus, scratch, given: decontamination.compare(corpus, given.rounds),
    "wet": lambda corpus, scratch, given: wet.compare(corpus, given.rounds),
    "scaling": lambda corpus, scratch, given: scaling.measure(corpus, scratch, given.rounds),
    "filters": lambda corpus, scratch, given: filters.measure(corpus, given.rounds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(ROWS)}; all if none")
    cache = Path(os.environ.get("BENCH_DATA_CACHE", Path(tempfile.gettempdir()) / "broadgauge-bench-data"))
    parser.add_argument("--cache", type=Path, default=cache, help="folder that keeps the corpus ($BENCH_DATA_CACHE)")
    parser.add_argument("--large", action="store_true", help="335 MB of text in place of 110")
    parser.add_argument("--rounds", type=int, default=5, help="of what is quick")
    parser.add_argument("--slow-rounds", type=int, default=1, help="of whole commands that take half a minute")
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM whose tools take part")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - ROWS.keys():
        parser.error(f"no {min(unknown)}; known: {', '.join(ROWS)}")
    corpus = make_corpus(arguments.cache, arguments.large)
    print(f"{corpus.origin}: {corpus.jsonl.stat().st_size / 1e6:.0f} MB of jsonl in {arguments.cache}")
    print(f"load average at the start: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory(dir=arguments.cache) as scratch:
        for name in arguments.names or ROWS:
            print(f"\n{name}", flush=True)
            ROWS[name](corpus, Path(scratch), arguments)


if __name__ == "__main__":
    main()
