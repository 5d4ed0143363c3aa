"""Drops documents that break a rule of quality; the rules themselves are in `c4` and `gopher`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from data_pipeline.document import Document
from data_pipeline.filters import c4, gopher
from data_pipeline.filters.measures import Rule, TextMeasures
from data_pipeline.tally import Tally

RuleSet = Literal["c4", "gopher", "gopher_repetition"]
RULE_SETS: dict[RuleSet, tuple[Rule, ...]] = {
    "c4": c4.RULES,
    "gopher": gopher.QUALITY_RULES,
    "gopher_repetition": gopher.REPETITION_RULES,
}


class QualityRules:
    """A step. The first rule that a document breaks, in the order of RULE_SETS, names why it is dropped."""

    def __init__(self, names: Sequence[RuleSet]) -> None:
        self._cuts_lines = "c4" in names
        self._rules = [rule for name, rules in RULE_SETS.items() if name in names for rule in rules]

    def __call__(self, documents: list[Document], tally: Tally) -> list[Document]:
        if not self._rules or not documents:
            return documents
        if self._cuts_lines:
            documents = [_without_boilerplate(document, tally) for document in documents]
        measures = TextMeasures([document.text for document in documents])
        broken = np.array([rule.is_broken(measures) for rule in self._rules])  # [rules, d]
        first_broken = np.where(broken.any(axis=0), broken.argmax(axis=0), -1)
        kept = []
        for document, index in zip(documents, first_broken.tolist(), strict=True):
            if index < 0:
                kept.append(document)
            else:
                tally.drop(self._rules[index].reason, document.id, document.text)
        return kept


def _without_boilerplate(document: Document, tally: Tally) -> Document:
    text, num_lines = c4.cut_boilerplate_lines(document.text)
    if not num_lines:
        return document
    tally.repair("boilerplate_lines", document.id, num_lines)
    return replace(document, text=text)
