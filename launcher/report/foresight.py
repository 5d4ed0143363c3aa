"""What was planned beside what was measured, for a person."""

from collections.abc import Mapping

from launcher.history.foresight import Comparison
from launcher.report.planning import duration

_GIB = 2**30


def line(found: Comparison) -> str:
    """`step 0.41 s, predicted 0.38 s (+8 %); ...`: what there is of each quantity."""
    return "; ".join(
        [
            f"step {_told(found['step_seconds'], duration)}",
            f"{_told(found['tokens_per_second'], lambda rate: f'{rate:,.0f}')} tokens/s",
            f"MFU {_told(found['mfu'], lambda share: f'{share:.1%}')}",
            f"memory {_told(found['memory_bytes'], lambda amount: f'{amount / _GIB:.2f} GiB')}",
        ]
    )
