"""Reads whole sources through the public functions, for tests."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.document import Document
from data_pipeline.sources import Plan, plan_splits, read_split
from data_pipeline.sources.plan import SPLIT_BYTES
from data_pipeline.tally import Tally
from trainer.data_config import DataConfig

MAX_DOCUMENT_BYTES = 1_000_000


def plan(*sources: Path | str, text_field: str = "text", split_bytes: int = SPLIT_BYTES) -> Plan:
    config = DataConfig(sources=tuple(str(source) for source in sources), text_field=text_field)
    return plan_splits(config, split_bytes)


def read(
    *sources: Path | str,
    text_field: str = "text",
    split_bytes: int = SPLIT_BYTES,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> tuple[list[Document], Tally]:
    """All documents, and what was counted; every split must report the bytes that the plan promised."""
    tally = Tally()
    documents = []
    for split in plan(*sources, text_field=text_field, split_bytes=split_bytes).splits:
        reported: list[int] = []
        add: Callable[[int], None] = reported.append
        documents += read_split(split, max_document_bytes, tally, add)
        assert sum(reported) == split.size_bytes
        assert all(num_bytes > 0 for num_bytes in reported)
    return documents, tally


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def counts(tally: Tally) -> dict[str, int]:
    return {reason: count.count for reason, count in tally.dropped.items()}


def places(tally: Tally) -> dict[str, list[str]]:
    return {reason: count.places for reason, count in tally.dropped.items()}
