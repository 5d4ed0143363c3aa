"""Prompts are packed: never longer than the context, answers whole, demonstrations left out only as far as needed."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenization import train_tokenizer
from launcher.evaluation.examples import Example
from launcher.evaluation.prompts import (
    NO_TOKENS,
    TOO_LONG,
    Pair,
    cut_left,
    draw_demonstrations,
    pack_prompt,
    pack_scored,
    prompt_text,
)
from launcher.evaluation.task import Task
from launcher.evaluation.tokens import FolderTokenizer, TokenSplitter, stop_ids
from made_tasks import TEXTS
from trainer.data_config import TokenizerConfig

WORDS = st.lists(
    st.sampled_from(["the", "dog", "jumps", "answer", "사과", "é", "\n", "  ", "12", "?", "foxes"]), max_size=8
)
TEXT = WORDS.map(" ".join)
ANSWERS = st.one_of(TEXT, TEXT.map(" {}".format))
EXAMPLES = st.builds(Example, st.just("here:1"), TEXT, st.tuples(ANSWERS))
PAIRED = st.builds(Example, st.just("here:1"), TEXT, st.tuples(ANSWERS, ANSWERS), st.integers(0, 1), st.just(""))


def task_of(kind: str, **fields: object) -> Task:
    choices = {"choices": "options"} if kind == "multiple_choice" else {}
    return Task.model_validate({"name": "t", "kind": kind, "prompt": "{x}", "test": "t", **choices, **fields})


def joint(
    task: Task, demonstrations: list[Example], asked: Example, answer: str, tokenizer: FolderTokenizer
) -> list[int]:
    return tokenizer.encode(prompt_text(task, demonstrations, asked.prompt) + answer)


@settings(max_examples=120)
@given(PAIRED, st.lists(EXAMPLES, max_size=6), st.integers(1, 40), st.sampled_from(["", "Answer!"]))
def test_scored_texts(tokenizer, asked, demonstrations, context_tokens, instruction) -> None:
    task = task_of("multiple_choice", instruction=instruction)
    packed = pack_scored(TokenSplitter(tokenizer), task, asked, demonstrations, context_tokens)
    room = context_tokens + 1
    if isinstance(packed, str):
        alone = [joint(task, [], asked, answer, tokenizer) for answer in asked.answers]
        assert "" in asked.answers if packed == NO_TOKENS else max(map(len, alone)) >= room
        return
    num = packed.num_demonstrations
    for pair, answer in zip(packed.pairs, asked.answers, strict=True):
        assert pair.context and len(pair.context) + len(pair.continuation) <= room
        whole = joint(task, demonstrations[:num], asked, answer, tokenizer) or [tokenizer.end_of_text_id]
        tokens = [*pair.context, *pair.continuation]
        if pair.context == (tokenizer.end_of_text_id,):
            tokens = tokens[1:]
        assert tokens == whole[-len(tokens) :]  # what the tokenizer makes of the whole text
        assert tokenizer.decode(pair.continuation).endswith(answer)
        assert packed.is_truncated or len(tokens) == len(whole)
    if num < len(demonstrations):
        more = [joint(task, demonstrations[: num + 1], asked, answer, tokenizer) for answer in asked.answers]
        assert max(map(len, more)) > room - 1  # an empty context takes one token of its own


@settings(max_examples=120)
@given(EXAMPLES, st.lists(EXAMPLES, max_size=6), st.integers(2, 40), st.integers(1, 30))
def test_texts_to_go_on_from(tokenizer, asked, demonstrations, context_tokens, max_new_tokens) -> None:
    max_new_tokens = min(max_new_tokens, context_tokens - 1)
    task, room = task_of("generate", max_new_tokens=max_new_tokens), context_tokens - max_new_tokens
    packed = pack_prompt(TokenSplitter(tokenizer), task, asked, demonstrations, context_tokens)
    prompt, num = packed.pairs[0].context, packed.num_demonstrations

    def whole(num: int) -> list[int]:
        text = prompt_text(task, demonstrations[:num], asked.prompt).rstrip(" ")
        return tokenizer.encode(text) or [tokenizer.end_of_text_id]

    assert list(prompt) == whole(num)[-room:]
    assert packed.is_truncated == (len(whole(num)) > room)
    assert num == 0 if packed.is_truncated else num <= len(demonstrations)
    assert num == len(demonstrations) or len(whole(num + 1)) > room


def test_spaces_go_with_the_word_that_follows(tokenizer: FolderTokenizer) -> None:
    splitter = TokenSplitter(tokenizer)
    for context, answer in (("the lazy", " dog"), ("the lazy ", "dog"), ("the lazy  ", "dog")):
        before, after = splitter.split(context, answer)
        assert tokenizer.decode(before).rstrip(" ") == "the lazy"
        assert tokenizer.decode((*before, *after)) == context + answer
    assert splitter.split("the lazy", " dog") == splitter.split("the lazy ", "dog")
    assert len(splitter.split("the lazy", " dog")[1]) == 1


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_bpe", "sentencepiece_unigram"])
def test_every_kind_of_tokenizer_is_met_with_whole_texts(kind: str, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, TokenizerConfig(kind=kind), 350, tmp_path, 64)
    tokenizer = FolderTokenizer.load(tmp_path)
    for context, answer in (
        ("the lazy", " dog"),
        ("the lazy ", "dog"),
        ("Q: what\nA:", " 12"),
        ("학교", "에"),
        ("a\n\n", "b"),
    ):
        before, after = TokenSplitter(tokenizer).split(context, answer)
        assert [*before, *after] == tokenizer.encode(context + answer)
        assert tokenizer.decode((*before, *after)) == context + answer
        assert len(after) <= len(tokenizer.encode(answer)) + 2 and context.startswith(tokenizer.decode(before))


def test_a_token_across_the_place_belongs_to_the_answer(tokenizer: FolderTokenizer) -> None:
    whole = tokenizer.encode("the quick brown")
    context, continuation = TokenSplitter(tokenizer).split("the qui", "ck brown")
    assert [*context, *continuation] == whole and tokenizer.decode(continuation).endswith("quick brown")


def test_nothing_before_an_answer_is_the_end_of_text(tokenizer: FolderTokenizer) -> None:
    splitter, beginning = TokenSplitter(tokenizer), (tokenizer.end_of_text_id,)
    assert splitter.split("", " dog") == (beginning, tuple(tokenizer.encode(" dog")))
    assert splitter.prompt("") == splitter.prompt("  ") == beginning
    assert splitter.split("the", "") == (tuple(tokenizer.encode("the")), ())


def test_an_answer_without_tokens_or_longer_than_the_context_has_a_reason(tokenizer: FolderTokenizer) -> None:
    splitter, task = TokenSplitter(tokenizer), task_of("cloze")
    assert pack_scored(splitter, task, Example("", "the", ("",)), [], 8) == NO_TOKENS
    assert pack_scored(splitter, task, Example("", "the", (" zxzxzxzxzx",)), [], 8) == TOO_LONG


def test_the_last_token_is_no_input_so_that_one_more_fits(tokenizer: FolderTokenizer) -> None:
    splitter, task, asked = TokenSplitter(tokenizer), task_of("cloze"), Example("", "the lazy", (" fox jumps",))
    num, num_answer = len(tokenizer.encode("the lazy fox jumps")), len(tokenizer.encode(" fox jumps"))
    for context_tokens, is_truncated in ((num - 1, False), (num - 2, True), (num_answer, True)):
        packed = pack_scored(splitter, task, asked, [], context_tokens)
        assert not isinstance(packed, str) and packed.is_truncated == is_truncated
        assert len(packed.pairs[0].context) == context_tokens + 1 - num_answer
    assert pack_scored(splitter, task, asked, [], num_answer - 1) == TOO_LONG


def test_what_is_scored_by_parts_is_the_ending_after_each_choice(tokenizer: FolderTokenizer) -> None:
    asked = Example("", "the dog and the fox: the", (" dog", " fox"), 1, " jumps over")
    packed = pack_scored(TokenSplitter(tokenizer), task_of("multiple_choice", ending="x"), asked, [asked], 64)
    assert not isinstance(packed, str)
    assert {pair.continuation for pair in packed.pairs} == {tuple(tokenizer.encode(" jumps over"))}
    texts = [tokenizer.decode(pair.context) for pair in packed.pairs]
    shown = "the dog and the fox: the fox jumps over"
    assert texts == [f"{shown}\n\nthe dog and the fox: the{choice}" for choice in (" dog", " fox")]


@given(st.integers(0, 30), st.integers(0, 12), st.integers(0, 5), st.integers(0, 3))
def test_demonstrations_are_others_drawn_by_seed(num_train, shots, number, seed) -> None:
    train = [Example(f"t:{n}", f"p{n}", ("a",)) for n in range(num_train)]
    asked = Example("test:1", "p3", ("a",))
    drawn = draw_demonstrations(train, asked, shots, "task", number, seed)
    assert drawn == draw_demonstrations(train, asked, shots, "task", number, seed)
    assert drawn[:2] == draw_demonstrations(train, asked, min(2, shots), "task", number, seed)
    assert len({each.prompt for each in drawn} - {"p3"}) == len(drawn) == min(shots, num_train - (num_train > 3))


def test_each_example_has_demonstrations_of_its_own() -> None:
    train = [Example(f"t:{n}", f"p{n}", ("a",)) for n in range(20)]
    counts = dict.fromkeys((each.prompt for each in train), 0)
    for number in range(2000):
        for each in draw_demonstrations(train, Example("", "", ("",)), 2, "task", number, 0):
            counts[each.prompt] += 1
    assert all(140 < count < 260 for count in counts.values())  # 200 each, by a standard deviation of 14


def test_tokens_that_stop(tokenizer: FolderTokenizer) -> None:
    ids = stop_ids(tokenizer, ("\n", "dog"))
    assert tokenizer.end_of_text_id in ids
    assert {tokenizer.encode("\n")[-1], tokenizer.encode(" dog")[0]} <= set(ids)
    others = set(range(tokenizer.vocab_size)) - set(ids)
    assert not any("\n" in tokenizer.decode([token]) or "dog" in tokenizer.decode([token]) for token in others)


def test_a_context_without_room_is_gone() -> None:
    pair = Pair(tuple(range(20)), tuple(range(9)))
    assert [len(cut_left(pair, room).context) for room in (5, 9, 10, 28, 29, 40)] == [0, 0, 1, 19, 20, 20]
    assert cut_left(pair, 11).context == (18, 19)
