import random
from typing import get_args

import numpy as np
import pytest

from data_pipeline.document import Document
from data_pipeline.filters.c4 import cut_boilerplate_lines, has_sentences
from data_pipeline.filters.measures import TextMeasures
from data_pipeline.filters.quality import RULE_SETS, QualityRules, RuleSet
from data_pipeline.tally import DROP_REASONS, Tally
from trainer.config import QualityConfig

ENGLISH = (
    "The town lies where the river meets the sea, and most of its people have lived with the water all their lives. "
    "In spring the boats go out before the sun is up; by noon they come back to the harbour with whatever was caught.\n"
    "Older families keep a second house on the hill, because every few decades a storm floods the lower streets. "
    "Nobody remembers who built the first wall, but a stone in it carries a date from four hundred years ago.\n\n"
    "Visitors usually ask about the lighthouse. It was moved twice, once by a king and once by the wind."
)
KOREAN = (
    "우리 마을은 강이 바다와 만나는 곳에 자리 잡고 있으며, 주민들은 대부분 평생을 물과 함께 살아왔다. "
    "봄이면 해가 뜨기 전에 배들이 바다로 나가고, 정오 무렵이면 그날 잡은 고기를 싣고 항구로 돌아온다.\n"
    "오래된 집안들은 언덕 위에 집을 한 채 더 두는데, 몇십 년에 한 번씩 폭풍이 아랫동네를 물에 잠기게 하기 때문이다. "
    "첫 번째 방파제를 누가 쌓았는지 기억하는 사람은 없지만, 그 안의 돌 하나에는 사백 년 전 날짜가 새겨져 있다.\n\n"
    "찾아오는 사람들은 흔히 등대에 대해 묻는다. 등대는 두 번 옮겨졌는데, 한 번은 왕이 옮겼고 한 번은 바람이 옮겼다."
)
GERMAN = (
    "Die Stadt liegt dort, wo der Fluss ins Meer mündet, und die meisten ihrer Bewohner leben seit jeher am Wasser. "
    "Im Frühling fahren die Boote vor Sonnenaufgang hinaus und kommen gegen Mittag mit ihrem Fang zum Hafen zurück.\n"
    "Alte Familien haben ein zweites Haus auf dem Hügel, denn alle paar Jahrzehnte überflutet ein Sturm die Gassen. "
    "Niemand weiß mehr, wer die erste Mauer gebaut hat, doch ein Stein darin trägt eine vierhundert Jahre alte Ziffer."
)
JAPANESE = (
    "この町は川が海に注ぐ場所にあり、住民の多くは生涯を水とともに過ごしてきた。春になると、船は日の出前に沖へ出て、"
    "昼ごろにはその日の獲物を積んで港へ戻ってくる。\n古い家は丘の上にもう一軒の家を持っている。数十年に一度、嵐が低い通りを"
    "水浸しにするからだ。最初の壁を誰が築いたのかを覚えている者はいないが、その石の一つには四百年前の日付が刻まれている。"
)
NAMES = tuple(RULE_SETS)


def distinct_words(num: int, letters: int = 5) -> list[str]:
    """Made-up words, none twice."""
    draw, words = random.Random(0), dict[str, None]()
    while len(words) < num:
        words["".join(draw.choices("bcdfghjklmnpqrstvwxz", k=letters))] = None
    return list(words)


def prose(num_words: int, letters: int = 5) -> str:
    """Words that break no rule, with the stop words that English needs."""
    return " ".join(["the", "of", *distinct_words(num_words - 2, letters)])


def reason_for(text: str, names: tuple[RuleSet, ...] = NAMES) -> str | None:
    tally = Tally()
    kept = QualityRules(names)([Document("it", text)], tally)
    assert bool(kept) != bool(tally.dropped)
    return None if kept else next(iter(tally.dropped))


@pytest.mark.parametrize("text", [ENGLISH, KOREAN, GERMAN, JAPANESE], ids=["en", "ko", "de", "ja"])
def test_good_prose_passes_every_rule_in_any_language(text: str) -> None:
    assert reason_for(text) is None


def lines_of(num: int, ending: str = "", beginning: str = "") -> list[str]:
    words = distinct_words(num * 8)
    return [f"{beginning}the of {' '.join(words[8 * i : 8 * i + 8])}{ending}" for i in range(num)]


@pytest.mark.parametrize(
    ("reason", "within", "beyond"),
    [
        ("gopher_word_count", prose(50), prose(49)),
        ("gopher_word_count", "the of " + "word " * 99_998, "the of " + "word " * 99_999),
        ("gopher_word_length", prose(60, letters=9), prose(60, letters=12)),
        ("gopher_word_length", prose(60, letters=4), "the of " + "ab " * 60),
        ("gopher_hashes", prose(100) + " #" * 10, prose(100) + " #" * 11),
        ("gopher_ellipses", prose(100) + " x..." * 10 + "y", prose(100) + "… x" * 12),
        ("gopher_bullet_lines", "\n".join(lines_of(9, "", "- ") + lines_of(1)), "\n".join(lines_of(11, "", "• "))),
        (
            "gopher_ellipsis_lines",
            "\n".join(lines_of(3, "...") + lines_of(7)),
            "\n".join(lines_of(4, "…") + lines_of(6)),
        ),
        ("gopher_no_letters", prose(80) + " 17" * 20, prose(80) + " 17" * 10 + " |" * 11),
        ("gopher_stop_words", ENGLISH, "\n".join(f"{noun} prices today, new arrivals" for noun in distinct_words(20))),
    ],
)
def test_each_of_gophers_quality_rules_on_both_sides(reason: str, within: str, beyond: str) -> None:
    assert reason_for(within, ("gopher",)) is None
    assert reason_for(beyond, ("gopher",)) == reason


# Rae et al. 2021, table A1
MOST_REPEATED_LINES = {"lines": 0.30, "paragraphs": 0.30, "line_chars": 0.20, "paragraph_chars": 0.20}
MOST_FREQUENT = {2: 0.20, 3: 0.18, 4: 0.16}
MOST_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def more_or_less_repetitive() -> list[str]:
    """Documents of distinct words in which one part comes again and again, from never to always."""
    draw, words = random.Random(3), distinct_words(2000)
    texts = []
    for num_repeats in range(80):
        for part_words in (2, 3, 4, 12):
            parts = [draw.choices(words, k=draw.randrange(4, 20)) for _ in range(40)]
            parts += [words[:part_words]] * (num_repeats + 1)
            draw.shuffle(parts)
            separator = draw.choice(["\n", "\n\n", " "])
            texts.append(separator.join(" ".join(part) for part in parts))
    return texts


def test_the_rules_on_repetition_hold_the_papers_thresholds() -> None:
    measures = TextMeasures(more_or_less_repetitive())
    expected = {
        f"gopher_repeated_{what}": (measures.lines[f"repeated_{what}"], most)
        for what, most in MOST_REPEATED_LINES.items()
    }
    expected |= {f"gopher_frequent_{n}grams": (measures.ngrams[n], most) for n, most in MOST_FREQUENT.items()}
    expected |= {f"gopher_repeated_{n}grams": (measures.ngrams[n], most) for n, most in MOST_REPEATED.items()}
    assert [rule.reason for rule in RULE_SETS["gopher_repetition"]] == list(expected)
    for rule in RULE_SETS["gopher_repetition"]:
        fractions, most = expected[rule.reason]
        assert rule.is_broken(measures).tolist() == (fractions > most).tolist()
        assert 0 < rule.is_broken(measures).sum() < len(measures.texts)
        near = np.abs(fractions - most).min()
        assert near < 0.02, rule.reason  # so that a threshold a little off would be seen
        assert f"{most * 100:.0f} %" in DROP_REASONS[rule.reason]


def test_a_document_is_judged_alike_in_any_batch() -> None:
    texts = [*more_or_less_repetitive(), ENGLISH, KOREAN, "", GERMAN]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    together, alone = Tally(), Tally()
    step = QualityRules(["gopher", "gopher_repetition"])
    kept = step(documents, together)
    assert kept == [document for document in documents if step([document], alone)]
    assert {reason: c.count for reason, c in together.dropped.items()} == {
        reason: c.count for reason, c in alone.dropped.items()
    }
    assert len(together.dropped) > 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{ENGLISH}\nLorem Ipsum dolor sit amet.", "c4_lorem_ipsum"),
        (f"{ENGLISH}\nfunction f() {{ return 1; }}", "c4_curly_bracket"),
        (
            "One sentence with enough words in it. And a second one!\nNo end to this third line of words",
            "c4_few_sentences",
        ),
        ("One sentence with enough words in it. And a second one!\nThis is the third one, is it not?", None),
        ("Home.\nAbout.\nContact us.\nNews.\nImprint.", "c4_few_sentences"),
        (KOREAN, None),
        (JAPANESE, None),
    ],
)
def test_c4s_rules(text: str, reason: str | None) -> None:
    assert reason_for(text, ("c4",)) == reason


@pytest.mark.parametrize(
    ("text", "num_sentences"),
    [
        ("It costs 3.50 in the U.S. market today.", 2),  # abbreviations count, as for any rule on punctuation
        ('He said "stop it now!" and "never again." (He left at once.)', 3),
        ("図書館は朝九時に開きます。夜は閉まります。", 2),
        ("يفتح المكتب في التاسعة صباحا كل يوم. هل أنت هناك؟", 2),
        ("Nothing ends here and nothing does", 0),
        ("", 0),
    ],
)
def test_sentences(text: str, num_sentences: int) -> None:
    assert not num_sentences or has_sentences(text, num_sentences)
    assert not has_sentences(text, num_sentences + 1)


def test_lines_about_the_site_are_cut_and_counted() -> None:
    text = f"Please enable JavaScript to view this page.\n{ENGLISH}\nPrivacy Policy\nThis site uses cookies."
    assert cut_boilerplate_lines(text) == (ENGLISH, 3)
    assert cut_boilerplate_lines(ENGLISH) == (ENGLISH, 0)
    tally = Tally()
    documents = [Document("a", text), Document("b", "Cookie policy"), Document("c", ENGLISH)]
    assert QualityRules(["c4"])(documents, tally) == [Document("a", ENGLISH), Document("c", ENGLISH)]
    assert tally.repaired["boilerplate_lines"].count == 4
    assert tally.dropped["c4_few_sentences"].places == ["b"]


def test_the_first_rule_broken_names_the_reason_and_a_sample_is_kept() -> None:
    tally = Tally()
    assert QualityRules(["gopher_repetition", "gopher", "c4"])([Document("x", "{ lorem ipsum")], tally) == []
    assert list(tally.dropped) == ["c4_lorem_ipsum"]
    assert tally.samples["c4_lorem_ipsum"] == [("x", "{ lorem ipsum")]


def test_no_rules_and_no_documents() -> None:
    documents = [Document("x", "")]
    assert QualityRules([])(documents, Tally()) is documents
    assert QualityRules(NAMES)([], Tally()) == []


def test_every_rule_has_a_reason_of_its_own() -> None:
    reasons = [rule.reason for rules in RULE_SETS.values() for rule in rules]
    assert len(set(reasons)) == len(reasons)
    assert set(reasons) <= set(DROP_REASONS)
    assert set(RULE_SETS) == set(get_args(get_args(QualityConfig.model_fields["rules"].annotation)[0]))
