"""What a second worker gains, start-up taken off, and what a Ray cluster of this machine costs."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.data.corpus import VOCAB_SIZE, Corpus
from data_pipeline import pipeline
from data_pipeline.tasks import Workers
from data_pipeline.workers import LocalWorkers
from trainer.data_config import DataConfig

_TINY_LINES = 200


def measure(corpus: Corpus, scratch: Path, rounds: int) -> None:
    """A preparation of the whole corpus less one of a tiny one, by workers that have done both once already."""
    tiny = scratch / "tiny.jsonl"
    with open(corpus.jsonl, "rb") as lines:
        tiny.write_bytes(b"".join(line for line, _ in zip(lines, range(_TINY_LINES), strict=False)))
    started = time.perf_counter()
    with _ray(scratch) as cluster, LocalWorkers(1) as one, LocalWorkers(2) as two:
        print(f"a Ray cluster of this machine starts in {time.perf_counter() - started:.1f} s")
        pools: dict[str, Workers] = {"one worker": one, "two workers": two, "Ray, two workers": cluster}
        seconds: dict[tuple[str, str], list[float]] = {}
        for number in range(rounds + 1):
            for name, pool in pools.items():
                for which, source in (("tiny", tiny), ("whole", corpus.jsonl)):
                    took = _timed(lambda source=source, pool=pool: _prepare(source, corpus, pool, scratch))
                    if number:
                        seconds.setdefault((name, which), []).append(took)
    _show(pools, seconds)


def _show(pools: dict[str, Workers], seconds: dict[tuple[str, str], list[float]]) -> None:
    print(f"{'':20}{'whole s':>9}{'tiny s':>9}{'work s':>9}  one worker takes (least to most; of the least seconds)")
    works = {
        name: [w - t for w, t in zip(seconds[name, "whole"], seconds[name, "tiny"], strict=True)] for name in pools
    }
    for name, work in works.items():
        whole, tiny = (statistics.median(seconds[name, which]) for which in ("whole", "tiny"))
        ratios = [one / mine for one, mine in zip(works["one worker"], work, strict=True)]
        least = min(works["one worker"]) / min(work)
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}; {least:.2f})"
        print(f"{name:20}{whole:9.2f}{tiny:9.2f}{statistics.median(work):9.2f}  {spread}")


def _prepare(source: Path, corpus: Corpus, workers: Workers, scratch: Path) -> None:
    data = DataConfig.model_validate(
        {
            "sources": str(source),
            "dedup": {"exact": False},
            "heldout_fraction": 0.05,
            "tokenizer": {"path": str(corpus.tokenizer)},
        }
    )
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        pipeline.prepare(data, vocab_size=VOCAB_SIZE, seq_length=8, out=Path(out) / "data", workers=workers)


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@contextmanager
def _ray(scratch: Path) -> Iterator[Workers]:
    """A cluster of two processors here, with the environment that `launcher.job.ray_workers` gives its tasks."""
    import ray

    from launcher.job.embedded_ray import isolated
    from launcher.job.ray_workers import RayWorkers

    with isolated(), tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            runtime_env={
                "env_vars": {"RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
            },
        )
        try:
            yield RayWorkers()
        finally:
            ray.shutdown()
