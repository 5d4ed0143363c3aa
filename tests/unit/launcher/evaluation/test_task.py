"""Task files: what is refused, in one line that says what to do."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from launcher.evaluation.finding import SHIPPED, load_tasks, shipped_names
from launcher.evaluation.task import METRICS, DecodingSection, HeldoutSection, Task, read_task
from launcher.evaluation.templates import fields_of, fill
from made_tasks import RECORDS, write_task
from trainer.config import UserError
from trainer.inference.requests import Decoding

CHOICES = {"kind": "multiple_choice", "choices": "options", "prompt": "{question}"}
OPTIONS = {"question": "?", "options": ["a", "b"], "label": 1}


def refusal(path: Path | str, **more: Any) -> str:
    with pytest.raises(UserError) as refused:
        load_tasks([str(path)], **more)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "must hold a mapping of task keys, not a list"),
        (b"kind: [\n", "is not valid YAML"),
        (b"kind: \xff\n", "cannot read the task"),
        (b"", "kind: field required"),
        (b"kind: generate\nprompt: x\n", "a task has either test, a file of records, or heldout"),
        (b"kind: guess\nprompt: x\ntest: t\n", "kind: input should be 'multiple_choice', 'generate' or 'cloze'"),
        (b"kind: cloze\npromt: x\ntest: t\n", "unknown key promt; did you mean prompt?"),
        (b"kind: cloze\nprompt: 3\ntest: t\n", "prompt: input should be a valid string, got 3"),
        (b'kind: cloze\nprompt: "\\ud800 {a}"\ntest: t\n', "half of a surrogate pair is no text"),
        (b"kind: " + b"[" * 3000 + b"]" * 3000, "is not valid YAML: it is nested too deep"),
    ],
)
def test_files_that_are_no_tasks(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    told = refusal(tmp_path / "bad.yaml")
    assert message in told and "bad.yaml" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{question"}, "prompt: the brace at character 0 of '{question' begins or ends no {field}"),
        ({"prompt": "{question.upper}"}, "begins or ends no {field}; double it"),
        ({"prompt": "{0}"}, "begins or ends no {field}"),
        ({"answer": "yes"}, "answer 'yes' names no field, so all answers would be the same"),
        ({"choices": "options"}, "choices means nothing for kind generate; remove it, or set kind to multiple_choice"),
        ({"normalization": "sum"}, "normalization means nothing for kind generate"),
        ({"kind": "multiple_choice"}, "choices is missing, and kind multiple_choice needs it"),
        ({**CHOICES, "answer": " {question}"}, "answer ' {question}' does not show the choice; put {choice} into it"),
        ({**CHOICES, "stop": "x"}, "stop means nothing for kind multiple_choice; remove it, or set kind to generate"),
        ({**CHOICES, "ending": "x", "normalization": "answer_context"}, "use tokens or sum with ending"),
        ({"metrics": ["accuracy"]}, "metrics: generate has no accuracy; it has exact_match, normalized_match, f1"),
        ({"shots": [0, 2]}, "shots 2 needs demonstrations; name a file of records by train"),
        ({"shots": [-1]}, "shots.0: input should be greater than or equal to 0, got -1"),
        ({"shots": [True]}, "shots.0: input should be a valid integer, got True"),
        ({"shots": []}, "shots: tuple should have at least 1 item"),
        ({"stop": ["\n", ""]}, "stop: the empty text ends every answer before it begins"),
        ({"heldout": {}}, "a task has either test, a file of records, or heldout"),
        ({"test": None, "heldout": {"min_words": 9, "max_words": 3}}, "heldout.min_words 9 is above"),
        ({"test": None, "heldout": {}, "train": "t.jsonl"}, "train means nothing beside heldout"),
        ({"test": None, "heldout": {}, "kind": "cloze"}, "prompt: held-out text has no {question}; it has {context}"),
        ({"decoding": {"temperature": 0.5}}, "set beams to 1, or temperature to 0"),
        ({"decoding": {"beam": 2}}, "unknown key decoding.beam; did you mean decoding.beams?"),
        ({"max_new_tokens": 0}, "max_new_tokens: input should be greater than or equal to 1"),
        ({"name": "a b"}, "name: string should match pattern"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(write_task(tmp_path, **changes))


@pytest.mark.parametrize(
    ("test", "fields", "message"),
    [
        ([], {}, "made.test.jsonl of the task made holds no record; write one JSON object a line into it"),
        ([["a"]], {}, "made.test.jsonl:1 is a list; write one JSON object a line"),
        ([*RECORDS, {"question": "?"}], {}, "made.test.jsonl:7 has no field answer, only question; name one of its"),
        ([{}], {}, "made.test.jsonl:1 has no field question, only none"),
        ([{"question": None, "answer": "a"}], {}, "made.test.jsonl:1 has None in question; make it a text or a number"),
        ([{"question": True, "answer": "a"}], {}, "has True in question; make it a text or a number"),
        ([{"question": ["a"], "answer": "a"}], {}, "prompt of the task made: "),
        ([{"question": "?", "answer": []}], {}, "has [] in answer; make it a list of texts"),
        ([{"question": "?", "answer": [None]}], {}, "has None in answer; make it a text or a number"),
        ([{"question": "?", "answer": ["a"], "b": ["c"]}], {"answer": "{answer}{b}"}, "has lists in answer and b"),
        ([OPTIONS | {"label": 2}], CHOICES, "has 2 in label, and its choices are 'a', 'b'; give one of them, or its"),
        ([OPTIONS | {"label": -1}], CHOICES, "has -1 in label"),
        ([OPTIONS | {"label": True}], CHOICES, "has True in label"),
        ([OPTIONS | {"label": "c"}], CHOICES, "has 'c' in label"),
        ([{"question": "?", "options": ["a", "b"]}], CHOICES, "label of the task made: "),
        ([OPTIONS | {"options": ["a", "a"]}], CHOICES, "has 'a' twice; keep one of them"),
        ([OPTIONS | {"options": ["a"]}], CHOICES, "has 1 of them; give two or more"),
        ([OPTIONS | {"options": "ab"}], CHOICES, "has 'ab' in options; make it a list of texts"),
        ([OPTIONS], {**CHOICES, "choices": ["{x}", "b"]}, "has no field x"),
        ([OPTIONS], {**CHOICES, "choices": ["{x", "b"]}, "choices.0: the brace at character 0"),
        ([OPTIONS], {**CHOICES, "ending": "{tail}"}, "has no field tail"),
        (None, {"train": "none.jsonl", "shots": [1]}, "none.jsonl of the task made cannot be read (No such file"),
        (None, {"test": "none.jsonl"}, "none.jsonl of the task made cannot be read (No such file"),
        (None, {"test": "."}, "of the task made cannot be read (Is a directory"),
        (None, {"test": "a\0b"}, "of the task made cannot be read (it has a NUL); name another file"),
    ],
)
def test_records_that_a_task_cannot_use(
    test: list[Any] | None, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refusal(write_task(tmp_path, test, **fields))


def test_messages_about_large_records_are_short(tmp_path: Path) -> None:
    many = [f"choice {number}" for number in range(1000)]
    assert len(refusal(write_task(tmp_path, [OPTIONS | {"options": many, "label": 1000}], **CHOICES))) < 600
    assert len(refusal(write_task(tmp_path, [dict.fromkeys(many, 1)]))) < 600


def test_lines_that_are_no_records(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    for line, message in (
        (b'{"question": ', "made.test.jsonl:2 is not JSON"),
        (b'{"question": "\xff"}', "made.test.jsonl:2 is not UTF-8"),
    ):
        path.with_name("made.test.jsonl").write_bytes(b'{"question": "?", "answer": "a"}\n' + line + b"\n")
        told = refusal(path)
        assert message in told and "cannot be read" not in told


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    path.with_name("made.test.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "?", "answer": "a"}\r\n\n  \n')
    (loaded,) = load_tasks([str(path)])
    assert [each.shown for each in loaded.test] == ["Q: ?\nA: a"]


def test_demonstrations_that_are_too_few(tmp_path: Path) -> None:
    path = write_task(tmp_path, train_records=RECORDS[:2], shots=[0, 3])
    assert "shots 3 of the task made needs as many demonstrations, and there are 2 in made.train.jsonl" in refusal(path)


def test_names_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no task 'copyng'; did you mean copying?" in refusal("copyng")
    assert "cannot read the task" in refusal(tmp_path / "none.yaml")
    assert "lastword is made of held-out text; name a folder of prepared data" in refusal("all")
    assert "holds no task" in refusal(tmp_path)
    one, other = write_task(tmp_path, name="one"), write_task(tmp_path, name="other")
    monkeypatch.chdir(tmp_path)
    assert [each.task.name for each in load_tasks([".", "one.yaml", "copying"])] == ["one", "other", "copying"]
    arithmetic = [name for name in shipped_names() if name.startswith("arithmetic")]
    assert len(arithmetic) == 10
    assert [each.task.name for each in load_tasks(["arithmetic_*", arithmetic[0]])] == arithmetic
    other.write_text(f"name: one\n{one.read_text()}")
    assert "are both tasks called one; give one another name" in refusal(tmp_path)


def test_a_name_that_is_too_long_for_a_path() -> None:
    assert "there is no task 'aaa" in refusal("a" * 5000)


def test_templates_know_fields_and_nothing_else() -> None:
    assert fields_of("{a} {{b}} {c_1}{a}") == ("a", "c_1")
    assert fill("{a} {{b}} {c_1}", {"a": "{c_1}", "c_1": "}"}) == "{c_1} {b} }"
    for bad in ("{", "}", "{}", "{a!r}", "{a:>3}", "{a[0]}", "{a.b}", "{ a }", "{{a}"):
        with pytest.raises(ValueError, match="brace"):
            fields_of(bad)


def test_answers_may_be_several_and_demonstrations_show_the_first(tmp_path: Path) -> None:
    (loaded,) = load_tasks([str(write_task(tmp_path, [{"question": 7, "answer": ["seven", 7]}]))])
    (example,) = loaded.test
    assert (example.prompt, example.answers, example.shown) == ("Q: 7\nA:", (" seven", " 7"), "Q: 7\nA: seven")


def test_choices_are_told_by_place_or_text(tmp_path: Path) -> None:
    records = [OPTIONS, OPTIONS | {"label": "a"}]
    (loaded,) = load_tasks([str(write_task(tmp_path, records, **CHOICES))])
    assert [each.right for each in loaded.test] == [1, 0]
    assert loaded.test[0].answers == (" a", " b")
    fixed = {**CHOICES, "choices": ["yes", "{question}!"], "answer": "-{choice}"}
    (loaded,) = load_tasks([str(write_task(tmp_path, records[:1], **fixed))])
    assert loaded.test[0].answers == ("-yes", "-?!")


def test_as_many_records_as_asked(tmp_path: Path) -> None:
    (loaded,) = load_tasks([str(write_task(tmp_path, max_examples=4))])
    assert len(loaded.test) == 4


def test_every_way_of_decoding_can_be_set() -> None:
    assert {*DecodingSection.model_fields} == {field.name for field in fields(Decoding)} - {"seed"}
    assert DecodingSection().with_seed(3) == Decoding(beams=4, length_penalty=0.6, seed=3)


@pytest.mark.parametrize("section", [Task, HeldoutSection, DecodingSection])
def test_every_field_is_documented(section: Any) -> None:
    page = (Path(__file__).parents[4] / "docs" / "tasks.md").read_text()
    prefix = {Task: "", HeldoutSection: "heldout.", DecodingSection: "decoding."}[section]
    for name, field in section.model_fields.items():
        assert field.description, name
        assert f"| `{prefix}{name}` |" in page, name


def test_the_page_names_every_metric_and_its_example_is_a_task(tmp_path: Path) -> None:
    page = (Path(__file__).parents[4] / "docs" / "tasks.md").read_text()
    assert all(f"`{metric}`" in page for metrics in METRICS.values() for metric in metrics)
    (tmp_path / "capitals.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    record = page.partition("```json\n")[2].partition("```")[0]
    (tmp_path / "capitals.test.jsonl").write_text(record)
    (tmp_path / "capitals.train.jsonl").write_text(record * 8)
    (loaded,) = load_tasks([str(tmp_path)])
    assert loaded.test[0].shown.startswith("Q: ")


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_tasks_say_what_they_are(name: str) -> None:
    assert read_task(SHIPPED / f"{name}.yaml").about.endswith(".")
