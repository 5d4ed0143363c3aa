"""Keeps evaluation texts out of training (GPT-3, appendix C): what the corpus shares with them is cut out.

Workers find the overlaps of their part (`EvaluationNgrams.overlaps`), one process tells which n-grams are common
phrases (`common_ngrams`), and workers cut around the rest (`spans_by_document`, `cut`). Where the text has changed in
between, overlaps are found once more, with `EvaluationNgrams.without` the common ones.
"""

from data_pipeline.decontamination.cut import cut
from data_pipeline.decontamination.evaluation import read_evaluation
from data_pipeline.decontamination.overlaps import OVERLAP, EvaluationNgrams, common_ngrams, spans_by_document

__all__ = ["OVERLAP", "EvaluationNgrams", "common_ngrams", "cut", "read_evaluation", "spans_by_document"]
