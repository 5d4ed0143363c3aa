"""How far a preparation has come, for a person."""

import time
from typing import Protocol

from data_pipeline.tasks import Advance, Report


class Progress(Protocol):
    """Hears how far a stage has come."""

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None: ...


class NoProgress:
    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        pass


def meter(progress: Progress, stage: str, total_bytes: int | None) -> Report:
    """Turns what workers report into updates with documents, tokens and the rate so far."""
    started = time.monotonic()

    def update(advance: Advance) -> None:
        rate = advance.input_bytes / max(time.monotonic() - started, 1e-3)  # bytes/s
        tokens = f", {advance.tokens:,} tokens" if advance.tokens else ""
        left = f", {(total_bytes - advance.input_bytes) / rate:,.0f} s left" if total_bytes and rate else ""
        doing = f"{stage}: {advance.documents:,} documents{tokens}, {rate / 1e6:,.0f} MB/s{left}"
        progress.update(doing, advance.input_bytes, total_bytes, "bytes")

    return update
