"""Reading WET files: our source, which gives documents, beside warcio and fastwarc, which give records."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.data.corpus import Corpus, make_wet
from benchmarks.data.timing import megabytes_per_second, show
from data_pipeline.sources import plan_splits, read_split
from data_pipeline.tally import Tally
from trainer.data_config import DataConfig


def compare(corpus: Corpus, rounds: int) -> None:
    make_wet(corpus)
    num_records: dict[str, int] = {}
    megabytes = corpus.wet(False).stat().st_size / 1e6
    print(f"{megabytes:.0f} MB of WET, uncompressed, rates of processor time")
    for compressed in (False, True):
        path = corpus.wet(compressed)
        print(".gz" if compressed else "plain")
        readers: dict[str, Callable[[Path], int]] = {"ours": ours, "warcio": warcio, "fastwarc": fastwarc}
        runs = {name: _counting(read, path, name, num_records) for name, read in readers.items()}
        rates = megabytes_per_second(runs, megabytes, rounds)
        show(rates, "ours", {name: f"{num:,} records" for name, num in num_records.items()})


def _counting(read: Callable[[Path], int], path: Path, name: str, counts: dict[str, int]) -> Callable[[], None]:
    def run() -> None:
        counts[name] = read(path)

    return run


def ours(path: Path) -> int:
    """Decoded, checked and with their place."""
    data = DataConfig(sources=(str(path),))
    return sum(1 for split in plan_splits(data).splits for _ in read_split(split, data.max_document_bytes, Tally()))


def warcio(path: Path) -> int:
    """Decoded."""
    from warcio.archiveiterator import ArchiveIterator

    with open(path, "rb") as file:
        return sum(bool(record.content_stream().read().decode()) for record in ArchiveIterator(file))


def fastwarc(path: Path) -> int:
    """Decoded."""
    from fastwarc.warc import ArchiveIterator

    with open(path, "rb") as file:
        return sum(bool(record.reader.read().decode()) for record in ArchiveIterator(file))
