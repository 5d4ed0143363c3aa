"""Records of task files, made into the texts that a model reads."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from launcher.evaluation.task import CHOICE, Task
from launcher.evaluation.templates import fields_of, fill
from trainer.config import UserError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One record as text."""

    place: str
    """Where it was found: `arithmetic.test.jsonl:12`."""
    prompt: str
    answers: tuple[str, ...]
    """Of a multiple choice all of them, as they would follow the prompt; otherwise those that are right."""
    right: int = 0
    """Place of the right one among them, and of the one that demonstrations show."""
    ending: str = ""
    """What follows every choice."""

    @property
    def shown(self) -> str:
        """With its right answer, as a demonstration."""
        return self.prompt + self.answers[self.right] + self.ending


def read_examples(task: Task, path: Path, most: int | None = None) -> tuple[Example, ...]:
    """Examples of a .jsonl file, the first `most` of them; empty lines are passed over.

    Raises:
        UserError: the file or a record of it cannot be used; the message names the line.
    """
    examples: list[Example] = []
    for number, record in _records(path, task.name):
        if most is not None and len(examples) == most:
            break
        examples.append(example_of(task, record, f"{path}:{number}"))
    if not examples:
        raise UserError(f"{path} of the task {task.name} holds no record; write one JSON object a line into it")
    return tuple(examples)


def example_of(task: Task, record: Record, place: str) -> Example:
    """Raises:
    UserError: the record does not have what the task's templates name.
    """
    filled = _Filled(task, record, place)
    prompt = filled.text("prompt", task.prompt)
    if task.kind != "multiple_choice":
        return Example(place, prompt, filled.alternatives())
    choices = filled.choices()
    answers = tuple(filled.text("answer", task.answer_template, {CHOICE: choice}) for choice in choices)
    return Example(place, prompt, answers, filled.right(choices), filled.text("ending", task.ending))


def _records(path: Path, task: str) -> Iterator[tuple[int, Record]]:
    number = 0
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} of the task {task} cannot be read (it has a NUL); name another file")
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    record = orjson.loads(line.decode("utf-8"))
                    if not isinstance(record, dict):
                        raise UserError(f"{path}:{number} is a {type(record).__name__}; write one JSON object a line")
                    yield number, record
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number} is not UTF-8 ({error.reason}); convert the file") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}:{number} is not JSON ({error}); mend the line") from None
    except OSError as error:
        raise UserError(f"{path} of the task {task} cannot be read ({error.strerror}); name another file") from None


class _Filled:
    """The templates of a task, filled from one record."""

    def __init__(self, task: Task, record: Record, place: str) -> None:
        self._task, self._record, self._place = task, record, place

    def text(self, key: str, template: str, more: Mapping[str, str] | None = None) -> str:
        """The template filled, `more` before the record's own fields."""
        more = more or {}
        return fill(
            template, {name: more[name] if name in more else self._plain(key, name) for name in fields_of(template)}
        )

    def alternatives(self) -> tuple[str, ...]:
        """The answer template filled with each entry of the field that is a list, or once."""
        template = self._task.answer_template
        lists = [name for name in fields_of(template) if isinstance(self._record.get(name), list)]
        if not lists:
            return (self.text("answer", template),)
        if len(lists) > 1:
            raise self._error(
                "answer", f"has lists in {' and '.join(lists)}", "keep one, so that each entry is an answer"
            )
        entries = self._entries("answer", lists[0])
        return tuple(self.text("answer", template, {lists[0]: entry}) for entry in entries)

    def choices(self) -> list[str]:
        named = self._task.choices
        if isinstance(named, str):
            choices = self._entries("choices", named)
        else:
            choices = [self.text("choices", choice) for choice in named or ()]
        if len(choices) < 2:
            raise self._error("choices", f"has {len(choices)} of them", "give two or more")
        twice = [choice for choice in choices if choices.count(choice) > 1]
        if twice:
            raise self._error("choices", f"has {twice[0]!r} twice", "keep one of them")
        return choices

    def right(self, choices: list[str]) -> int:
        """Place of the right one."""
        label = self._value("label", self._task.label)
        if isinstance(label, str) and label in choices:
            return choices.index(label)
        if type(label) is int and 0 <= label < len(choices):
            return label
        raise self._error(
            "label",
            f"has {_short(label)} in {self._task.label}, and its choices are {_some(map(repr, choices))}",
            f"give one of them, or its place from 0 to {len(choices) - 1}",
        )

    def _entries(self, key: str, name: str) -> list[str]:
        value = self._value(key, name)
        if not isinstance(value, list) or not value:
            raise self._error(key, f"has {_short(value)} in {name}", "make it a list of texts")
        return [self._as_text(key, name, entry) for entry in value]

    def _plain(self, key: str, name: str) -> str:
        return self._as_text(key, name, self._value(key, name))

    def _value(self, key: str, name: str) -> Any:
        if name not in self._record:
            has = _some(self._record) or "none"
            raise self._error(key, f"has no field {name}, only {has}", "name one of its fields, or add it")
        return self._record[name]

    def _as_text(self, key: str, name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise self._error(key, f"has {_short(value)} in {name}", "make it a text or a number")

    def _error(self, key: str, problem: str, fix: str) -> UserError:
        return UserError(f"{key} of the task {self._task.name}: {self._place} {problem}; {fix}")


def _some(names: Iterable[str]) -> str:
    """As many as a line has room for."""
    text = ", ".join(names)
    return text if len(text) < 240 else f"{text[:237]}..."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
