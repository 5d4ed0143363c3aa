"""Cloze examples made of held-out text: a passage and its last word, as in LAMBADA (Paperno et al. 2016)."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.manifest import Manifest
from data_pipeline.publishing import TOKENIZER_FOLDER
from data_pipeline.shards import read_index
from data_pipeline.tokenization import Tokenizer
from launcher.evaluation.examples import Example, example_of
from launcher.evaluation.task import HeldoutSection, Task
from trainer.config import UserError

_LAST_WORD = re.compile(r"(?<=\S) ([^\W\d_]{2,})(?=[.!?]+(?:\s|$))")
"""A word of letters between a space and the end of a sentence."""
_SENTENCE_BEGIN = re.compile(r"(?:^|(?<=[.!?]\s)|(?<=\n))\S")
_READ_TOKENS = 4096
"""Of a long document, so much from its beginning."""


def heldout_examples(task: Task, prepared: Path, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(test, train) examples from documents drawn by the seed, each of another document.

    Raises:
        UserError: there is no prepared data, or no held-out document with such a passage.
    """
    section = task.heldout
    assert section is not None
    num_test = min(section.test_documents, task.max_examples or section.test_documents)
    wanted = num_test + section.train_documents
    found: list[Example] = []
    for place, text in _documents(prepared, seed):
        passage = passage_of(text, section, random.Random(xxhash.xxh3_64_intdigest(text.encode(), seed)))
        if passage is not None:
            record = {"context": passage[0], "word": passage[1]}
            found.append(example_of(task, record, place))
        if len(found) == wanted:
            break
    if not found:
        raise UserError(
            f"the task {task.name}: no held-out document of {prepared} has a sentence that ends in a word after "
            f"{section.min_words} to {section.max_words} words; lower heldout.min_words, or hold out more text"
        )
    num_train = min(section.train_documents, len(found) // 4)
    return tuple(found[num_train:][:num_test]), tuple(found[:num_train])


def passage_of(text: str, section: HeldoutSection, draw: random.Random) -> tuple[str, str] | None:
    """(context, last word) of one of the text's sentences, or None where none will do.

    The context begins with a sentence if that leaves enough words, else in the middle of one.
    """
    ends = list(_LAST_WORD.finditer(text))
    while ends:
        end = ends.pop(int(draw.random() * len(ends)))
        words = [*re.finditer(r"\S+", text[: end.start()])][-section.max_words :]
        if len(words) < section.min_words:
            continue
        last_begin = words[-section.min_words].start()
        begins = [match.start() for match in _SENTENCE_BEGIN.finditer(text, 0, last_begin + 1)]
        first = next((begin for begin in begins if begin >= words[0].start()), words[0].start())
        context = text[first : end.start()]
        if not section.word_in_context or end[1].lower() in re.findall(r"[^\W\d_]+", context.lower()):
            return context, end[1]
    return None


def _documents(prepared: Path, seed: int) -> Iterator[tuple[str, str]]:
    """(place, text) of the held-out documents, in an order drawn by the seed."""
    names = list(Manifest.load(prepared).datasets)
    tokenizer = Tokenizer.load(prepared / TOKENIZER_FOLDER, "reference")
    try:
        indexes = [read_index(prepared / name / "heldout.idx") for name in names]
        ends = np.cumsum([len(lengths) for lengths, _ in indexes])
        for number in np.random.default_rng(seed).permutation(int(ends[-1])).tolist():
            at = int(np.searchsorted(ends, number, side="right"))
            lengths, offsets = indexes[at]
            document = number - int(ends[at]) + len(lengths)
            length = min(int(lengths[document]) - 1, _READ_TOKENS)  # without its end-of-text token
            path = prepared / names[at] / "heldout.bin"
            ids = np.fromfile(path, tokenizer.dtype, length, offset=int(offsets[document]))
            yield f"{path}#{document}", tokenizer.decode(ids)
    except (OSError, ValueError) as error:
        raise UserError(f"{prepared} is damaged ({error}); prepare it again") from error
