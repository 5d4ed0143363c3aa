"""GPT-3's five word scrambling tasks (section 3.9.2): cycled, two anagrams, apart, reversed."""

from collections.abc import Callable
from random import Random

from launcher.evaluation.making.files import MadeTask, below, pick, shuffled, split
from launcher.evaluation.making.words import WORDS

_INSERTED = tuple(" !\"#$%&'()*+,-./:;?")
_SEED = 392


def scrambling() -> list[MadeTask]:
    return [
        _task("scrambled_cycled", "CL: the letters cycled.", _cycled),
        _task("scrambled_anagram_1", "A1: all letters but the first and the last shuffled.", _inner_shuffled(1)),
        _task(
            "scrambled_anagram_2", "A2: all letters but the first two and the last two shuffled.", _inner_shuffled(2)
        ),
        _task("scrambled_insertion", "RI: a punctuation mark or a space between all letters.", _apart),
        _task("scrambled_reversed", "RW: the word backwards.", lambda draw, word: word[::-1]),
    ]


def _task(name: str, about: str, scramble: Callable[[Random, str], str | None]) -> MadeTask:
    draw = Random(f"{_SEED} {name}")
    found = [(word, scramble(draw, word)) for word in shuffled(draw, WORDS)]
    records = [{"scrambled": other, "word": word} for word, other in found if other not in (None, word)]
    tree = {
        "about": f"{about} As GPT-3's task of that name (section 3.9.2), on words of our own.",
        "kind": "generate",
        "instruction": "Please unscramble the letters into a word, and write that word:",
        "prompt": "{scrambled} =",
        "answer": " {word}",
        "separator": "\n",
        "shots": [0, 1, 16],
        "max_new_tokens": 16,
        "metrics": ["exact_match"],
    }
    return split(name, tree, records, num_train=len(records) // 5)


def _cycled(draw: Random, word: str) -> str:
    at = 1 + below(draw, len(word) - 1)
    return word[at:] + word[:at]


def _inner_shuffled(kept: int) -> Callable[[Random, str], str | None]:
    """None for a word whose inner letters have one order only."""

    def scramble(draw: Random, word: str) -> str | None:
        inner = word[kept:-kept]
        if len(set(inner)) < 2:
            return None
        while (mixed := "".join(shuffled(draw, inner))) == inner:
            pass
        return word[:kept] + mixed + word[-kept:]

    return scramble


def _apart(draw: Random, word: str) -> str:
    return word[0] + "".join(pick(draw, _INSERTED) + letter for letter in word[1:])
