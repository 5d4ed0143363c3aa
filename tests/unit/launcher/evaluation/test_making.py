"""The shipped tasks are what the committed code makes, and what they say is true."""

import ast
from collections import Counter

import orjson
import pytest

from launcher.evaluation.finding import SHIPPED, load_tasks, shipped_names
from launcher.evaluation.making import contents, made_tasks
from launcher.evaluation.making.korean import in_words
from launcher.evaluation.making.words import WORDS

BY_HAND = {"lastword.yaml"}


def records(name: str) -> list[dict]:
    files = [SHIPPED / f"{name}.{split}.jsonl" for split in ("test", "train")]
    return [orjson.loads(line) for path in files for line in path.read_bytes().splitlines()]


def test_committed_files_are_what_the_code_makes() -> None:
    committed = {path.name: path.read_bytes() for path in SHIPPED.iterdir() if path.name not in BY_HAND}
    assert committed == contents(made_tasks()), "run `make tasks`"


def test_no_record_is_asked_twice_or_shown_beforehand() -> None:
    for loaded in load_tasks([name for name in shipped_names() if name != "lastword"]):
        counts = Counter((each.prompt, each.answers) for each in (*loaded.test, *loaded.train))
        assert max(counts.values()) == 1, loaded.task.name
        assert len(loaded.test) >= 100 and len(loaded.train) >= max(loaded.task.shots)


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("arithmetic_")])
def test_sums_are_right(name: str) -> None:
    for loaded in load_tasks([name]):
        for example in loaded.test:
            asked = example.prompt.removeprefix("Q: What is ").removesuffix("?\nA:")
            for verb, sign in (("plus", "+"), ("minus", "-"), ("times", "*")):
                asked = asked.replace(verb, sign)
            tree = ast.parse(asked, mode="eval")
            assert example.answers == (f" {eval(compile(tree, '', 'eval'))}",)
    digits = int(name.split("_")[1][0])
    numbers = [record[key] for record in records(name) for key in ("a", "b") if key in record]
    assert all(0 <= number < 10**digits for number in numbers)
    assert not numbers or max(numbers) > 0.9 * 10**digits  # they fill the range


def test_scrambled_words_have_the_letters_of_the_word_and_one_solution() -> None:
    assert len({"".join(sorted(word)) for word in WORDS}) == len(WORDS)
    for name in shipped_names():
        if name.startswith("scrambled"):
            for record in records(name):
                word, scrambled = record["word"], record["scrambled"]
                assert word in WORDS and scrambled != word
                assert sorted(filter(str.isalpha, scrambled)) == sorted(word)
                kept = {"scrambled_anagram_1": 1, "scrambled_anagram_2": 2}.get(name, 0)
                assert (
                    scrambled[:kept] == word[:kept] and scrambled[len(scrambled) - kept :] == word[len(word) - kept :]
                )
    assert all(record["scrambled"] == record["word"][::-1] for record in records("scrambled_reversed"))
    assert all(record["scrambled"] in record["word"] * 2 for record in records("scrambled_cycled"))
    assert all(record["scrambled"][::2] == record["word"] for record in records("scrambled_insertion"))


def test_sequences_go_on_as_they_began() -> None:
    for record in records("induction"):
        words = record["sequence"].split()
        assert words[6:] == words[: len(words) - 6] and record["next"] == words[len(words) - 6]
    for record in records("larger_number"):
        assert sorted(record["choices"]) == sorted([str(record["a"]), str(record["b"])])
        assert int(record["label"]) == max(record["a"], record["b"])
    places = Counter(record["choices"].index(record["label"]) for record in records("larger_number"))
    assert min(places.values()) > 100


def test_korean_numbers() -> None:
    """Against numbers as they are written in Korea."""
    written = {
        1: "일", 10: "십", 11: "십일", 20: "이십", 99: "구십구", 100: "백", 101: "백일", 110: "백십", 365: "삼백육십오",
        1000: "천", 1004: "천사", 1988: "천구백팔십팔", 2005: "이천오", 4050: "사천오십", 9999: "구천구백구십구",
    }  # fmt: skip
    assert {number: in_words(number) for number in written} == written
    assert len({in_words(number) for number in range(1, 10_000)}) == 9999
    assert all(record["words"] == in_words(record["number"]) for record in records("korean_numbers"))
    assert all(record["a"] + record["b"] == record["answer"] for record in records("korean_sums"))


def test_korean_particles() -> None:
    """은, 이 and 을 follow a final consonant: of a number the last digit's name decides, or ten's."""
    after_number = {0: "은", 1: "은", 2: "는", 3: "은", 4: "는", 5: "는", 6: "은", 7: "은", 8: "은", 9: "는"}
    assert all(record["particle"] == after_number[record["b"] % 10] for record in records("korean_sums"))
    said = {record["before"].split()[-1] + record["label"] for record in records("korean_particles")}
    assert {"사과는", "사과가", "사과를", "책은", "책이", "책을", "물을", "학교가", "달은", "별이", "해를"} <= said
    labels = Counter(record["label"] for record in records("korean_particles"))
    assert set(labels) == {"은", "는", "이", "가", "을", "를"} and min(labels.values()) > 15
