"""Where documents come from: files of many formats, local or behind URLs, Hugging Face data sets, Python itself.

`plan_splits` looks at the sources and cuts them into pieces; `read_split` reads one piece, in any process.
"""

from data_pipeline.sources.plan import Plan, origin, plan_splits
from data_pipeline.sources.python_stdlib import PYTHON_STDLIB
from data_pipeline.sources.read import content_hash, is_unchanged, read_split
from data_pipeline.sources.split import Split, UnreadableSplit

__all__ = [
    "PYTHON_STDLIB",
    "Plan",
    "Split",
    "UnreadableSplit",
    "content_hash",
    "is_unchanged",
    "origin",
    "plan_splits",
    "read_split",
]
