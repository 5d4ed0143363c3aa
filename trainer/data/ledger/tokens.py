"""Reading again what the steps were fed."""

from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np

from trainer.data.batches import Draws, TrainingData
from trainer.data.digest import as_hex, sample_digests
from trainer.data.ledger.order import PlacedStep
from trainer.data.ledger.report import span
from trainer.data.windows import read_windows

_BYTES_AT_ONCE = 32 << 20


def compare_tokens(data: TrainingData, steps: Sequence[PlacedStep], draws: Draws) -> Iterator[str]:
    """Yields the steps that were fed other tokens than their samples have in the prepared data.

    `draws` are those of all samples of the steps, one step after another. Steps that record no digest are not read.
    """
    is_compared = [step.record.digest is not None for step in steps]
    compared = list(compress(steps, is_compared))
    if not compared:
        return
    chosen = np.flatnonzero(np.repeat(is_compared, [step.num_samples for step in steps]))
    starts = np.cumsum([0, *(step.num_samples for step in compared[:-1])])
    totals = np.add.reduceat(_digests(data, draws, chosen), starts)  # modulo 2^64, as unsigned numbers add up
    for step, total in zip(compared, totals.tolist(), strict=True):
        recorded = step.record.digest
        if recorded is not None and recorded != total:
            yield (
                f"step {step.record.number} was fed other tokens than the data has in "
                f"{span('sample', step.first_sample, step.end)}: their xxh3-64 is {as_hex(total)}, and it records "
                f"{as_hex(recorded)}"
            )


def _digests(data: TrainingData, draws: Draws, chosen: np.ndarray) -> np.ndarray:
    """uint64 [n], the digest of each sample in `chosen` [n]."""
    rows = max(1, _BYTES_AT_ONCE // (8 * (data.config.model.seq_length + 1)))
    parts = [chosen[start : start + rows] for start in range(0, len(chosen), rows)]
    return np.concatenate(
        [sample_digests(read_windows(data.readers, draws.datasets[part], draws.windows[part])) for part in parts]
    )
