"""`broadgauge generate`: a text goes on, by ranks with a run's own model or by transformers with a folder of theirs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.tokenization import Tokenizer
from launcher.job.ranks import ready_ranks
from launcher.verbs.inspection import find_to_export, scratch_run
from trainer.checkpoint.format import store
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.inference.layout import inference_config
from trainer.inference.requests import Decoding, Generate, Generated, Tokens, read_answers, write_requests

Say = Callable[[str], None]
"""Told of each piece of text."""

_HALF_A_CHARACTER = "\ufffd"  # what bytes that are no character yet are decoded as
_DEFAULT = Decoding(temperature=1.0)


def generate(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    decoding: Decoding | None,
    say: Say,
    data: Path | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Say the prompt, and how it goes on as that becomes known.

    Args:
        path: a run or a checkpoint, or a Hugging Face folder.
        max_new_tokens: fewer are generated where the context ends, or where the model ends the text.
        decoding: None draws as the model's `generation_config.json` says, or by plain probabilities.

    Raises:
        UserError: there is no model, or the prompt is empty or leaves no room for a new token.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("the prompt is not UTF-8; give it as text")
    folder = _exported(path)
    if folder is None:
        decoding = replace(decoding or _DEFAULT, seed=seed)
        _by_ranks(path, prompt, max_new_tokens, decoding, say, data, settings)
        return
    from trainer.checkpoint.huggingface import generation

    if data is not None or settings:
        raise UserError(f"{folder} has its own tokenizer and no config of ours; leave out --data and --set")
    options = options_for_transformers(decoding) if decoding is not None else {}
    say(prompt + generation.generate(folder, prompt, max_new_tokens, seed, **options))


def _exported(path: Path) -> Path | None:
    """The Hugging Face folder that the path means; None for a run or a checkpoint.

    Raises:
        UserError: it is none of them.
    """
    if (path / "config.json").is_file():
        return path
    if store.named(path):
        return None
    if (path / "export" / "config.json").is_file():
        return path / "export"
    raise UserError(f"{path} is no Hugging Face folder, no checkpoint and no run that has one; train or import a model")


def options_for_transformers(decoding: Decoding) -> dict[str, Any]:
    """As `transformers.GenerationConfig` has it, whatever a folder's own says. Their length penalty is the exponent of
    the length itself."""
    draws = decoding.temperature > 0 and decoding.beams == 1
    return {
        "do_sample": draws,
        "temperature": decoding.temperature if draws else None,
        "top_k": (decoding.top_k or 0) if draws else None,
        "top_p": (1.0 if decoding.top_p is None else decoding.top_p) if draws else None,
        "repetition_penalty": decoding.repetition_penalty,
        "no_repeat_ngram_size": decoding.no_repeat_ngram,
        "num_beams": decoding.beams,
        **({"length_penalty": decoding.length_penalty, "early_stopping": True} if decoding.beams > 1 else {}),
    }


# ---------------------------------------------------------------------------------------------------------- our ranks


def _by_ranks(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    decoding: Decoding,
    say: Say,
    data: Path | None,
    settings: Sequence[str],
) -> None:
    found, tokenizer_folder = find_to_export(path, data, settings)
    tokenizer = Tokenizer.load(tokenizer_folder, engine="reference")
    request = request_of(prompt, max_new_tokens, decoding, tokenizer, found.config.model)
    text = GrowingText(tokenizer.decode, request.prompt, request.stop_ids)
    say(prompt)
    with scratch_run() as run_dir, store.being_read(found.checkpoint):
        requests, output, stream = (run_dir.path / name for name in ("requests.jsonl", "answers.jsonl", "stream"))
        write_requests(requests, [request])
        follower = StreamFollower(stream)

        def look() -> None:
            if piece := text.add(follower.new()):
                say(piece)

        with ready_ranks(_one_replica(found.config), run_dir) as ranks:
            ranks.run("answer", look, checkpoint=found.checkpoint, output=output, requests=requests, stream=stream)
        (answer,) = read_answers(output, [request])
    assert isinstance(answer, Generated)
    say(text.rest(answer.tokens))


def _one_replica(config: RunConfig) -> RunConfig:
    """One request needs no more; but every machine of several has its part."""
    return inference_config(config, replicas=1 if config.launch.nodes == 1 else None)


def request_of(
    prompt: str, max_new_tokens: int, decoding: Decoding, tokenizer: Tokenizer, model: ModelConfig
) -> Generate:
    """Raises:
    UserError: the prompt is empty, or leaves no room for a new token.
    """
    tokens = tuple(int(token) for token in tokenizer.encode_batch([prompt]).ids)
    if not tokens:
        raise UserError("the prompt is empty; give at least one token to continue")
    room = model.seq_length - len(tokens)
    if room < 1:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, and the model reads at most {model.seq_length} with at least 1 new "
            f"token among them; shorten it to {model.seq_length - 1} tokens"
        )
    return Generate(tokens, min(max_new_tokens, room), (tokenizer.end_of_text_id,), decoding)


class StreamFollower:
    """What ranks append to a stream of tokens (`trainer.rank_spec.RankSpec.stream`)."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def new(self) -> Tokens:
        """Tokens of whole lines since the last call."""
        if not self._path.exists():
            return ()
        with open(self._path, "rb") as stream:
            stream.seek(self._position)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        return tuple(int(line.split()[1]) for line in whole.splitlines())


class GrowingText:
    """The text of tokens that come one after the other, in pieces of whole characters."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Tokens, stop_ids: Tokens) -> None:
        self._decode, self._prompt, self._stop_ids = decode, prompt, stop_ids
        self._tokens: Tokens = ()
        self._said = decode(prompt)  # with which the rest is decoded, as a token may look different at the beginning
        self._first = len(self._said)

    def add(self, tokens: Tokens) -> str:
        """What is sure by now and was not said before."""
        if not tokens:
            return ""
        self._tokens += tokens
        return self._new(self._text(self._tokens).rstrip(_HALF_A_CHARACTER))

    def rest(self, tokens: Tokens) -> str:
        """What is left to say of the whole continuation."""
        return self._new(self._text(tokens))

    def _new(self, text: str) -> str:
        if not text.startswith(self._said):
            return ""
        piece = text[len(self._said) :]
        self._said = text
        return piece

    def _text(self, tokens: Tokens) -> str:
        return self._decode([*self._prompt, *(token for token in tokens if token not in self._stop_ids)])
