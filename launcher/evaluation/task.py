"""One task as its YAML file states it; docs/tasks.md has an example."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PlainSerializer, model_validator

from launcher.evaluation.templates import fields_of
from trainer.config import UserError
from trainer.config_file import read_tree, validated
from trainer.inference.requests import Decoding
from trainer.section import Section, Strings, Tokens

Kind = Literal["multiple_choice", "generate", "cloze"]
Metric = Literal["accuracy", "answer_logprob", "exact_match", "normalized_match", "f1"]

METRICS: dict[Kind, tuple[Metric, ...]] = {
    "multiple_choice": ("accuracy", "answer_logprob"),
    "generate": ("exact_match", "normalized_match", "f1"),
    "cloze": ("accuracy", "answer_logprob"),
}
"""Those that each kind can have; of each the larger is the better."""

CHOICE = "choice"
"""The field by which an answer template shows one of the choices."""

_ONLY_OF: dict[Kind, tuple[str, ...]] = {
    "multiple_choice": ("choices", "label", "ending", "normalization", "answer_context"),
    "generate": ("decoding", "max_new_tokens", "stop"),
    "cloze": (),
}

_Texts = Annotated[tuple[str, ...], Field(strict=False), PlainSerializer(list)]


class DecodingSection(Section):
    """How a continuation is chosen: by beam search of width 4 as in GPT-3 (section 2.4), unless said otherwise."""

    beams: Annotated[int, Field(ge=1)] = 4
    """Continuations followed at once; 1 takes the likeliest token, or draws one where `temperature` is above 0."""
    length_penalty: Annotated[float, Field(ge=0.0)] = 0.6
    """Exponent a of ((5 + tokens) / 6)^a, by which a beam's log-probability is divided (Wu et al. 2016)."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Logits are divided by it before a token is drawn; 0 draws nothing."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Tokens to draw among, the likeliest; empty: all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Probability of the likeliest tokens to draw among; empty: all."""
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Positive logits of tokens that have come are divided by it, negative ones multiplied; 1 changes nothing."""
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 0
    """Tokens in a row that may not come twice; 0: any may."""

    @model_validator(mode="after")
    def _draws_or_searches(self) -> Self:
        if self.beams > 1 and self.temperature > 0:
            raise UserError(
                f"decoding.temperature {self.temperature:g} draws tokens and decoding.beams {self.beams} searches for "
                "the likeliest; set beams to 1, or temperature to 0"
            )
        return self

    def with_seed(self, seed: int) -> Decoding:
        return Decoding(**self.model_dump(), seed=seed)


class HeldoutSection(Section):
    """Examples made of a prepared folder's held-out text: a passage (`{context}`) that a sentence ends, and the last
    word of it (`{word}`), as in LAMBADA (Paperno et al. 2016)."""

    min_words: Annotated[int, Field(ge=1)] = 20
    """Words of a passage before the last one, at least."""
    max_words: Annotated[int, Field(ge=1)] = 80
    """Words of a passage before the last one, at most."""
    word_in_context: bool = True
    """Take only passages in which the word stands before, as in most of LAMBADA: so that context tells it."""
    test_documents: Annotated[int, Field(ge=1)] = 200
    """Documents to take an example each from, as far as there are so many."""
    train_documents: Annotated[int, Field(ge=0)] = 40
    """Other documents, for demonstrations; at most a quarter of all that have a passage."""

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.min_words > self.max_words:
            raise UserError(f"heldout.min_words {self.min_words} is above heldout.max_words {self.max_words}; lower it")
        return self


class Task(Section):
    """What a model is asked, from which records, and how its answers are graded."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """What results call it; the name of the file, if not given."""
    about: str = ""
    """What it measures, in a sentence, with its source."""
    kind: Kind
    """`multiple_choice`: which of several answers is the likeliest? `generate`: what comes of it, freely? `cloze`: is
    the answer what the model would say, token by token?"""
    test: str | None = None
    """Records to be graded by: a .jsonl file, beside this one unless the path is absolute."""
    train: str | None = None
    """Records for demonstrations, likewise."""
    heldout: HeldoutSection | None = None
    """Make the records of held-out text, in place of `test` and `train`."""
    instruction: str = ""
    """Stands before everything, once; empty: nothing does."""
    prompt: str
    """Template of the question, over the fields of a record. Spaces at its end are asked for with the answer, as
    tokenizers join them to the word that follows."""
    answer: str | None = None
    """Template of what follows the prompt, white space between them included. ` {choice}` if not given, or of other
    kinds ` {answer}`. One of its fields may be a list: any of its entries is right, demonstrations show the first."""
    separator: str = "\n\n"
    """Between instruction, demonstrations and question."""
    shots: Annotated[
        tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(strict=False, min_length=1), PlainSerializer(list)
    ] = (0,)
    """Numbers of demonstrations: the task is measured once with each."""
    choices: str | _Texts | None = None
    """Field of a record with the list of its choices; or a list of them, each a template, the same for all records."""
    label: str = "label"
    """Field with the right choice: its place, from 0, or its text."""
    ending: str = ""
    """Template of what follows every choice. If given it is what is scored, after each choice (partial evaluation, as
    GPT-3 does for Winograd schemas)."""
    normalization: Literal["tokens", "sum", "answer_context"] = "tokens"
    """How choices are compared: by their log-probability per token, by its sum, or by that less the one which they have
    after `answer_context` alone (GPT-3, section 2.4)."""
    answer_context: str = "Answer:"
    """What makes an answer likely whatever the question."""
    decoding: DecodingSection = DecodingSection()
    """How answers are generated."""
    max_new_tokens: Annotated[Tokens, Field(ge=1)] = 32
    """Tokens of an answer at most."""
    stop: Annotated[Strings, Field(min_length=1)] = ("\n",)
    """The answer ends before the first of these texts."""
    metrics: Annotated[tuple[Metric, ...] | None, Field(strict=False)] = None
    """`accuracy` (share), `answer_logprob` (nats per token of the right answer), `exact_match` (share, white space at
    the ends aside), `normalized_match` and `f1` (as SQuAD grades). If not given, the first of its kind."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Records of `test` to use, the first so many; empty: all."""
    contamination_ngram: Annotated[int, Field(ge=1)] | None = None
    """Words in a row that a test record shares with training text if it counts as seen. Empty: the 5th percentile of
    the records' lengths, but 8 at least and 13 at most (GPT-3, appendix C)."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        self._check_kind()
        self._check_records()
        self._check_templates()
        return self

    @property
    def answer_template(self) -> str:
        if self.answer is not None:
            return self.answer
        if self.kind == "multiple_choice":
            return f" {{{CHOICE}}}"
        return " {word}" if self.heldout else " {answer}"

    @property
    def metric_names(self) -> tuple[Metric, ...]:
        return self.metrics or METRICS[self.kind][:1]

    @property
    def score_names(self) -> list[str]:
        """What results call what is measured: `arithmetic_2d_plus/1-shot/exact_match`."""
        return [f"{self.name}/{shots}-shot/{metric}" for shots in self.shots for metric in self.metric_names]

    def _check_kind(self) -> None:
        for kind, fields in _ONLY_OF.items():
            idle = [field for field in fields if field in self.model_fields_set] if kind != self.kind else []
            if idle:
                raise UserError(f"{idle[0]} means nothing for kind {self.kind}; remove it, or set kind to {kind}")
        wrong = [metric for metric in self.metric_names if metric not in METRICS[self.kind]]
        if wrong:
            raise UserError(f"metrics: {self.kind} has no {wrong[0]}; it has {', '.join(METRICS[self.kind])}")
        if self.kind == "multiple_choice" and not self.choices:
            raise UserError("choices is missing, and kind multiple_choice needs it; name the field with a record's own")
        if self.ending and self.normalization == "answer_context":
            raise UserError(
                "normalization answer_context would divide the ending's probability by the same for every choice; use "
                "tokens or sum with ending"
            )
        if not self.answer_context:
            raise UserError("answer_context is empty; give the text that makes an answer likely, like 'Answer:'")
        if "" in self.stop:
            raise UserError("stop: the empty text ends every answer before it begins; remove it")

    def _check_records(self) -> None:
        if (self.test is None) == (self.heldout is None):
            raise UserError("a task has either test, a file of records, or heldout; give one of the two")
        if self.heldout and self.train is not None:
            raise UserError("train means nothing beside heldout, which makes its own; remove train")
        if max(self.shots) and self.train is None and self.heldout is None:
            raise UserError(f"shots {max(self.shots)} needs demonstrations; name a file of records by train")

    def _check_templates(self) -> None:
        templates = {"prompt": self.prompt, "answer": self.answer_template, "ending": self.ending}
        if isinstance(self.choices, tuple):
            templates |= {f"choices.{number}": choice for number, choice in enumerate(self.choices)}
        for key, template in templates.items():
            try:
                names = fields_of(template)
            except ValueError as error:
                raise UserError(f"{key}: {error}") from None
            if key == "answer" and not names:
                raise UserError(f"answer {template!r} names no field, so all answers would be the same; name one")
            unknown = set(names) - {"context", "word"}
            if self.heldout and unknown - {CHOICE}:
                raise UserError(f"{key}: held-out text has no {{{min(unknown)}}}; it has {{context}} and {{word}}")
        if self.kind == "multiple_choice" and CHOICE not in fields_of(self.answer_template):
            raise UserError(f"answer {self.answer!r} does not show the choice; put {{{CHOICE}}} into it")


def read_task(path: Path) -> Task:
    """Raises:
    UserError: it cannot be read, or is no task; the message begins with the path.
    """
    tree = read_tree(path, "the task")
    try:
        return validated(Task, {"name": path.stem} | tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
