"""A fast slice of the parity table; `make parity` prints all of it."""

import pytest

from parity import CASES, TOLERANCES, compare

# The layouts a change is most likely to break; every case of the table runs under `make parity`.
FAST_FP32 = [
    "one rank",
    "TP2",
    "TP2 SP",
    "PP2",
    "PP2 interleaved",
    "DP2 ZeRO-1",
    "DP2 ZeRO-2",
    "DP2 ZeRO-3",
    "TP2 x PP2",
    "TP2 SP x PP2 x DP2 interleaved",
    "TP2 x PP2 post-norm",
    "TP2 x PP2 recompute",
    "PP2 x DP2 ZeRO-2 untied",
]
FAST_BF16 = ["one rank", "TP2", "PP2", "DP2 ZeRO-1", "TP2 x PP2"]


@pytest.mark.parametrize("case", FAST_FP32)
def test_layout_computes_what_one_process_computes(case: str) -> None:
    difference = compare(case, "fp32")
    assert difference.within("fp32"), f"{difference} is beyond {TOLERANCES['fp32']}"


@pytest.mark.parametrize("case", FAST_BF16)
def test_layout_computes_what_one_process_computes_in_bf16(case: str) -> None:
    difference = compare(case, "bf16")
    assert difference.within("bf16"), f"{difference} is beyond {TOLERANCES['bf16']}"


def test_fast_cases_are_in_the_table() -> None:
    assert set(FAST_FP32 + FAST_BF16) <= CASES.keys()
