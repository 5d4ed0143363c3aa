"""What a model is asked, and what it answers, in tokens alone: texts, tokenizers and grades are others' business.

Requests lie in a file, one JSON object a line; answers in another, in the order of the requests. So whoever asks needs
no torch, and whoever answers may be one process, many ranks in any layout, or transformers with an exported model.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Decoding:
    """How the tokens of a continuation are chosen."""

    temperature: float = 0.0
    """Logits are divided by it before a token is drawn; 0 takes the likeliest."""
    top_k: int | None = None
    """Draw among so many of the likeliest tokens."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens that together have this probability (Holtzman et al. 2019)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that stand in prompt or continuation are divided by it where positive, else multiplied
    (Keskar et al. 2019)."""
    no_repeat_ngram: int = 0
    """No so many tokens in a row twice, prompt included; 0: as often as they come."""
    beams: int = 1
    """Continuations that are followed at once, of which the best is the answer; above 1 nothing is drawn."""
    length_penalty: float = 0.6
    """Exponent a: a beam's log-probability is divided by ((5 + length) / 6)^a (Wu et al. 2016, equation 14)."""
    seed: int = 0
    """Each request draws from a stream of its own, by this and its number: neither batches nor ranks matter."""


@dataclass(frozen=True)
class Score:
    """How likely is this continuation?"""

    context: Tokens
    """At least one token, with the continuation at most the model's context and one more."""
    continuation: Tokens
    """At least one."""


@dataclass(frozen=True)
class Generate:
    """How does the text go on?"""

    prompt: Tokens
    """At least one token, with `max_new_tokens` at most the model's context."""
    max_new_tokens: int
    stop_ids: Tokens = ()
    """Tokens that end the continuation, and are the last of it."""
    decoding: Decoding = Decoding()


Request = Score | Generate


@dataclass(frozen=True)
class Scored:
    """Answers `Score`."""

    logprobs: tuple[float, ...]
    """Nats, of each token of the continuation after all before it."""
    is_greedy: bool
    """Whether each of them is the likeliest in its place."""


@dataclass(frozen=True)
class Generated:
    """Answers `Generate`."""

    tokens: Tokens
    """The continuation, with the token that ended it."""


Answer = Scored | Generated

_REQUESTS: dict[str, type[Request]] = {"score": Score, "generate": Generate}
_ANSWERS: dict[str, type[Answer]] = {"scored": Scored, "generated": Generated}


def write_requests(path: Path, requests: Iterable[Request]) -> None:
    _write(path, requests)


def read_requests(path: Path) -> list[Request]:
    return [_request(line) for line in path.read_bytes().splitlines()]


def requests_fingerprint(path: Path) -> str:
    """Of a file of requests: answers to others are no answers to them."""
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """The file is whole or not there."""
    _write(path, answers)


def read_answers(path: Path, requests: Sequence[Request]) -> list[Answer]:
    """Raises:
    ValueError: they are not the answers to these requests.
    """
    answers = [_answer(line) for line in path.read_bytes().splitlines()]
    if len(answers) != len(requests):
        raise ValueError(f"{path} has {len(answers)} answers to {len(requests)} requests")
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True), 1):
        if isinstance(request, Score) != isinstance(answer, Scored):
            raise ValueError(f"{path}:{number} answers another request")
    return answers


def _write(path: Path, items: Iterable[Request | Answer]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as handle:
            for item in items:
                handle.write(orjson.dumps({"kind": type(item).__name__.lower(), **asdict(item)}) + b"\n")
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _request(line: bytes) -> Request:
    fields = orjson.loads(line)
    kind = _REQUESTS[fields.pop("kind")]
    if kind is Generate:
        fields["decoding"] = Decoding(**fields["decoding"])
    return kind(**_frozen(fields))


def _answer(line: bytes) -> Answer:
    fields = orjson.loads(line)
    return _ANSWERS[fields.pop("kind")](**_frozen(fields))


def _frozen(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
