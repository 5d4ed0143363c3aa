"""What a held-out evaluation says beside its loss."""

import numpy as np
import orjson
import pytest

from trainer.evaluate.heldout import DatasetLoss, HeldoutResult, loss_by_position


@pytest.mark.parametrize(
    ("seq_length", "ends"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_each_stretch_of_positions_is_as_long_as_all_before_it(seq_length: int, ends: list[int]) -> None:
    sums = np.arange(seq_length) * 3.0
    found = loss_by_position(sums, num_sequences=3)
    assert [each.end for each in found] == ends
    assert [each.first for each in found] == [0, *ends[:-1]]
    for each in found:
        assert each.loss == pytest.approx((each.first + each.end - 1) / 2)  # of a loss that is its position
        assert each.tokens == 3 * (each.end - each.first)


def test_the_record_grows_by_little() -> None:
    """Of 20 sources and a context of 128k tokens."""
    third = 1 / 3
    datasets = {f"source-{number}": DatasetLoss(third, 10**10, third) for number in range(20)}
    positions = loss_by_position(np.full(1 << 17, third), 1)
    result = HeldoutResult(third, 10**11, third, third, third, datasets, positions)
    event = result.as_event()
    assert len(orjson.dumps(event)) < 2048
    assert event["loss"] == third  # what a run is compared by, to the bit
    assert event["datasets"]["source-7"] == {"loss": 0.333333, "tokens": 10**10, "bits_per_byte": 0.333333}
    assert list(event["positions"].items())[:3] == [("0", 0.333333), ("1", 0.333333), ("2", 0.333333)]
