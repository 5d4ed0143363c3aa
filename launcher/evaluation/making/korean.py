"""Korean tasks: numbers in words, sums, and the particle that goes with a noun."""

from itertools import product
from random import Random

from launcher.evaluation.making.files import MadeTask, Record, below, made, shuffled, split

_DIGITS = ("", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")
_PLACES = ("", "십", "백", "천")
_FIRST_SYLLABLE, _NUM_FINALS = 0xAC00, 28  # Unicode's order of Hangul syllables: initial, vowel, final consonant

_NOUNS = (
    *("사과", "책", "학교", "물", "친구", "연필", "바다", "산", "나무", "꽃", "고양이", "강아지", "집", "창문", "의자"),
    *("책상", "시계", "전화", "가방", "신발", "모자", "우산", "자동차", "기차", "비행기", "배", "길", "다리", "공원"),
    *(
        "시장",
        "병원",
        "도서관",
        "음악",
        "그림",
        "영화",
        "노래",
        "편지",
        "신문",
        "빵",
        "밥",
        "우유",
        "커피",
        "설탕",
        "소금",
    ),
    *("달", "별", "해", "구름", "비", "눈", "바람", "강", "숲", "마을"),
)
_SENTENCES = (
    # what comes before the noun, the particles after a final consonant and after a vowel, what follows
    ("저기 있는 ", "은", "는", " 참 아름답습니다."),
    ("사진 속의 ", "이", "가", " 잘 보입니다."),
    ("우리는 오늘 ", "을", "를", " 생각했습니다."),
)


def korean() -> list[MadeTask]:
    return [_numbers(), _sums(), _particles()]


def in_words(number: int) -> str:
    """Sino-Korean, from 1 to 9999: 십 and not 일십 for 10."""
    words = ""
    for place in reversed(range(4)):
        digit = number // 10**place % 10
        if digit:
            words += ("" if digit == 1 and place else _DIGITS[digit]) + _PLACES[place]
    return words


def ends_in_consonant(text: str) -> bool:
    """Whether the last syllable has a final consonant: of the 28 that Unicode counts, the first is none."""
    return (ord(text[-1]) - _FIRST_SYLLABLE) % _NUM_FINALS != 0


def _numbers() -> MadeTask:
    def record(draw: Random) -> Record:
        number = 1 + below(draw, 9999)
        return {"number": number, "words": in_words(number)}

    tree = {
        "about": "Numbers from 1 to 9999 in Sino-Korean words.",
        "kind": "generate",
        "instruction": "숫자를 한글로 쓰세요.",
        "prompt": "{number} =",
        "answer": " {words}",
        "separator": "\n",
        "shots": [0, 1, 16],
        "max_new_tokens": 24,
        "metrics": ["exact_match"],
    }
    return made("korean_numbers", tree, record)


def _sums() -> MadeTask:
    def record(draw: Random) -> Record:
        a, b = 1 + below(draw, 99), 1 + below(draw, 99)
        return {"a": a, "b": b, "particle": "은" if ends_in_consonant(in_words(b)) else "는", "answer": a + b}

    tree = {
        "about": "Sums of two numbers from 1 to 99, asked in Korean, with the particle that the number takes.",
        "kind": "generate",
        "prompt": "문제: {a} 더하기 {b}{particle} 얼마입니까?\n답:",
        "shots": [0, 1, 8],
        "max_new_tokens": 16,
        "metrics": ["exact_match"],
    }
    return made("korean_sums", tree, record)


def _particles() -> MadeTask:
    records = []
    for noun, (before, after_consonant, after_vowel, ending) in product(_NOUNS, _SENTENCES):
        records.append(
            {
                "before": before + noun,
                "particles": [after_consonant, after_vowel],
                "ending": ending,
                "label": after_consonant if ends_in_consonant(noun) else after_vowel,
            }
        )
    tree = {
        "about": "The particle that goes with a noun (은/는, 이/가, 을/를): what follows is scored, after each one.",
        "kind": "multiple_choice",
        "prompt": "{before}",
        "choices": "particles",
        "answer": "{choice}",
        "ending": "{ending}",
        "separator": "\n",
        "shots": [0, 8],
        "metrics": ["accuracy"],
    }
    drawn = shuffled(Random("1446 korean_particles"), records)  # the year of Hangul
    return split("korean_particles", tree, drawn, num_train=len(drawn) // 5)
