"""A fast slice of the parity table; `make parity` prints all of it."""

import pytest

from parity import CASES, NUM_STEPS, TOLERANCES, compare
from trainer.support import FEATURES

# Every feature alone (the generated pairs of them run under `make parity`), and the deepest combinations.
FAST = [
    *FEATURES,
    "one rank",
    "TP2 SP x PP2 x DP2 interleaved",
    "Llama-class PP2 x DP2 ZeRO-2 interleaved + bf16",
    "GPT-3 TP2 x CP2 x DP2 ZeRO-2 + bf16",
    "GPT-1 TP2 SP x PP2",
]
# Deep combinations of which the fast ones hold every part.
SLOW = ["Llama-class TP2 SP x PP2 x CP2", "CP2 x TP2 x PP2", "TP2 x PP2 x DP2 + bf16"]
FEW_STEPS = 4  # what is wrong shows in the first that follow an update; `make parity` takes ten, and a slow test too


def expect_parity(case: str, num_steps: int) -> None:
    difference = compare(case, num_steps)
    assert difference.is_within_tolerance, f"{difference} is beyond {TOLERANCES[difference.precision]}"


@pytest.mark.parametrize("case", FAST)
def test_layout_computes_what_one_process_computes(case: str) -> None:
    expect_parity(case, FEW_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FAST, *SLOW])
def test_layout_computes_what_one_process_computes_in_more_steps(case: str) -> None:
    expect_parity(case, NUM_STEPS)


def test_cases_are_in_the_table() -> None:
    assert {*FAST, *SLOW} <= CASES.keys()
