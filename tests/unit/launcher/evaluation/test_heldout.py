"""Cloze records of held-out text."""

import random
from pathlib import Path

import pytest

from data_pipeline.inspection import documents
from launcher.evaluation.battery import Battery
from launcher.evaluation.finding import load_tasks
from launcher.evaluation.heldout import passage_of
from launcher.evaluation.task import HeldoutSection
from made_tasks import write_task
from trainer.config import UserError

FREE = HeldoutSection(min_words=4, max_words=8, word_in_context=False)


def heldout_task(folder: Path, name: str = "made", **heldout: object) -> str:
    section = {"min_words": 5, "max_words": 30, **heldout}
    path = write_task(folder, [], name=name, kind="cloze", prompt="{context}", test=None, heldout=section)
    return str(path)


def test_records_are_passages_of_heldout_documents(prepared: Path, tmp_path: Path, tokenizer) -> None:
    (loaded,) = load_tasks([heldout_task(tmp_path)], prepared)
    texts = [text for _, text in documents(prepared, None, "heldout", 0, 100)]
    assert len(loaded.test) + len(loaded.train) == len(texts) > 10 and len(loaded.train) == len(texts) // 4
    from_texts = set()
    for example in (*loaded.test, *loaded.train):
        (text,) = [text for text in texts if f"{example.shown}." in text]
        word = example.answers[0].strip()
        assert word in example.prompt.replace(".", " ").split()
        from_texts.add(text)
        assert 5 <= len(example.prompt.split()) <= 30
        assert text.startswith(example.prompt) or text[: text.index(example.prompt)].endswith(". ")
    assert len({each.place for each in (*loaded.test, *loaded.train)}) == len(from_texts) == len(texts)
    assert Battery.of([loaded], tokenizer, 256).requests


def test_the_seed_draws_documents_and_their_number_is_a_setting(prepared: Path, tmp_path: Path) -> None:
    name = heldout_task(tmp_path, test_documents=5, train_documents=1)
    drawn = [load_tasks([name], prepared, seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0].test != drawn[2].test
    assert (len(drawn[0].test), len(drawn[0].train)) == (5, 1)


def test_no_more_records_are_graded_than_were_asked_for(prepared: Path, tmp_path: Path) -> None:
    """However many documents there are, of which a quarter may be demonstrations."""
    few = load_tasks([heldout_task(tmp_path, test_documents=5, train_documents=40)], prepared)[0]
    assert len(few.test) == 5 and len(few.train) > 1


def test_where_nothing_will_do_it_is_said(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no held-out document of .* lower heldout.min_words"):
        load_tasks([heldout_task(tmp_path, min_words=900, max_words=1000)], prepared)
    with pytest.raises(UserError, match="holds no prepared data"):
        load_tasks([heldout_task(tmp_path)], tmp_path)


@pytest.mark.parametrize(
    ("text", "passage"),
    [
        ("One two three four five six.", ("One two three four five", "six")),
        ("Short one. One two three four five six.", ("Short one. One two three four five", "six")),
        ("The first sentence is long. One two three four five six.", ("One two three four five", "six")),
        ("a b c d e f g h i j k last!", ("d e f g h i j k", "last")),
        ("하나 둘 셋 넷 다섯 여섯 일곱.", ("하나 둘 셋 넷 다섯 여섯", "일곱")),
        ("one two three four 5.", None),  # no word
        ("one two three four five", None),  # no end
        ("two three four five.", None),  # too few
        ("See example.org one two three four U.S.", None),
    ],
)
def test_passages(text: str, passage: tuple[str, str] | None) -> None:
    assert passage_of(text, FREE, random.Random(0)) == passage


def test_the_word_stands_before_where_that_is_asked() -> None:
    strict = FREE.model_copy(update={"word_in_context": True})
    assert passage_of("one two three four five six.", strict, random.Random(0)) is None
    assert passage_of("One Six two three four six.", strict, random.Random(0)) == ("One Six two three four", "six")
    assert passage_of("One sixth two three four six.", strict, random.Random(0)) is None
