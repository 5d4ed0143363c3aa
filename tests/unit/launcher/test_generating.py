"""What is said of a continuation while it grows: whole characters, each once."""

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from data_pipeline.tokenization import Tokenizer
from launcher.verbs.generating import GrowingText, StreamFollower, options_for_transformers, request_of
from trainer.config import ModelConfig, UserError
from trainer.inference.requests import Decoding, Generate


def byte_level() -> Tokenizer:
    """Every byte is a token: characters come in up to four."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(tokenizers.models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend.to_str().encode())


TOKENIZER = byte_level()
END = TOKENIZER.end_of_text_id


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(int(token) for token in TOKENIZER.encode_batch([text]).ids)


@given(prompt=st.text(min_size=1), text=st.text(), cuts=st.lists(st.integers(1, 5)), ends=st.booleans())
def test_pieces_are_whole_characters_and_together_the_text(prompt: str, text: str, cuts: list[int], ends: bool) -> None:
    tokens = (*ids_of(text), *([END] if ends else []))
    growing, pieces, first = GrowingText(TOKENIZER.decode, ids_of(prompt), (END,)), [], 0
    for cut in [*cuts, len(tokens)]:
        pieces.append(growing.add(tokens[first : first + cut]))
        first += cut
    pieces.append(growing.rest(tokens))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_is_said_when_its_last_byte_has_come() -> None:
    growing = GrowingText(TOKENIZER.decode, ids_of("a"), (END,))
    tokens = ids_of("é🙂b")
    assert [growing.add((token,)) for token in tokens] == ["", "é", "", "", "", "🙂", "b"]


def test_what_ends_within_a_character_is_said_in_the_end() -> None:
    growing = GrowingText(TOKENIZER.decode, ids_of("a"), (END,))
    tokens = ids_of("b🙂")[:3]
    assert growing.add(tokens) == "b"
    assert growing.rest(tokens) == "\ufffd"


def test_a_stream_is_read_line_by_whole_line(tmp_path: Path) -> None:
    follower = StreamFollower(tmp_path / "stream")
    assert follower.new() == ()
    with open(tmp_path / "stream", "a", buffering=1) as stream:
        stream.write("0 17\n0 4")
        stream.flush()
        assert follower.new() == (17,)
        stream.write("2\n0 5\n")
        assert follower.new() == (42, 5)
        assert follower.new() == ()


def test_a_request_has_as_many_tokens_as_there_is_room_for() -> None:
    model, how = ModelConfig(seq_length=8), Decoding(top_k=3)
    assert request_of("abc", 64, how, TOKENIZER, model) == Generate(ids_of("abc"), 5, (END,), how)
    assert request_of("abc", 2, how, TOKENIZER, model).max_new_tokens == 2
    with pytest.raises(UserError, match="is empty"):
        request_of("", 4, how, TOKENIZER, model)
    with pytest.raises(UserError, match=r"8 tokens, and the model reads at most 8.*shorten it to 7"):
        request_of("abcdefgh", 4, how, TOKENIZER, model)


@pytest.mark.parametrize("own", [{}, {"do_sample": True, "top_k": 2, "top_p": 0.3, "repetition_penalty": 3.0}])
def test_transformers_does_what_is_asked_whatever_the_folder_says(own: dict[str, float]) -> None:
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    ).eval()
    model.generation_config = transformers.GenerationConfig(**own, pad_token_id=0)
    prompt = torch.tensor([[1, 2, 3]])

    def texts(decoding: Decoding, times: int = 1) -> set[tuple[int, ...]]:
        options = options_for_transformers(decoding)
        found = [model.generate(prompt, max_new_tokens=6, **options)[0].tolist() for _ in range(times)]
        return {tuple(text) for text in found}

    text = [1, 2, 3]
    for _ in range(6):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert texts(Decoding()) == texts(Decoding(temperature=5.0, top_k=1)) == {tuple(text)}
    assert len(texts(Decoding(temperature=50.0), 40)) == 40  # all but even
    assert len({each[3] for each in texts(Decoding(temperature=50.0, top_k=3), 40)}) == 3

    def logprob(text: tuple[int, ...]) -> float:
        logits = model(torch.tensor([text[:-1]])).logits[0, 2:].log_softmax(-1)
        return logits[range(6), text[3:]].sum().item()

    (best,) = texts(Decoding(beams=60, length_penalty=0.0))
    assert len(best) == 9 and logprob(best) > logprob(tuple(text)) + 1e-3
