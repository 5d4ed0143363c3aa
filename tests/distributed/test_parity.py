"""A fast slice of the parity table; `make parity` prints all of it."""

import pytest

from parity import CASES, TOLERANCES, compare
from trainer.support import FEATURES

# Every feature alone (the generated pairs of them run under `make parity`), and the deepest combinations.
FAST = [
    *FEATURES,
    "one rank",
    "one rank + bf16",
    "TP2 SP x PP2 x DP2 interleaved",
    "CP2 x TP2 x PP2",
    "Llama-class TP2 SP x PP2 x CP2",
    "Llama-class PP2 x DP2 ZeRO-2 interleaved + bf16",
    "GPT-3 TP2 x CP2 x DP2 ZeRO-2 + bf16",
    "GPT-1 TP2 SP x PP2",
    "TP2 x PP2 x DP2 + bf16",
]


@pytest.mark.parametrize("case", FAST)
def test_layout_computes_what_one_process_computes(case: str) -> None:
    difference = compare(case)
    assert difference.is_within_tolerance, f"{difference} is beyond {TOLERANCES[difference.precision]}"


def test_fast_cases_are_in_the_table() -> None:
    assert set(FAST) <= CASES.keys()
