"""One copy of texts that repeat: whole documents, nearly equal documents (MinHash), and paragraphs.

Workers write an index beside their part of the corpus (`IndexWriter`), one process decides over all parts from these
indexes alone (`decide`), and workers read what becomes of their documents (`read_verdicts`,
`read_removed_paragraphs`). Of copies the one with the lowest document number stays: parts come in order of priority.
"""

from data_pipeline.dedup.decide import decide
from data_pipeline.dedup.decisions import Verdict, read_removed_paragraphs, read_verdicts
from data_pipeline.dedup.index import IndexWriter, engine, index_files
from data_pipeline.dedup.paragraphs import remove_paragraphs

__all__ = [
    "IndexWriter",
    "Verdict",
    "decide",
    "engine",
    "index_files",
    "read_removed_paragraphs",
    "read_verdicts",
    "remove_paragraphs",
]
