import pytest

from data_pipeline.document import Document
from data_pipeline.filters.language import LanguageFilter, excerpt, identify
from data_pipeline.tally import Tally
from trainer.config import UserError
from trainer.data_config import LanguageConfig

TEXTS = {
    "ko": [
        "어제는 비가 많이 와서 하루 종일 집에서 책을 읽었습니다. 저녁에는 친구와 함께 김치찌개를 끓여 먹었어요.",
        "이 도서관은 평일 아침 아홉 시에 문을 열고, 시험 기간에는 자정까지 자리를 내어 준다.",
        "컴퓨터를 다시 시작한 다음에도 문제가 계속되면 설정 파일을 지우고 프로그램을 새로 설치해 보세요.",
    ],
    "en": [
        "The library opens at nine in the morning, and during exams it stays open until midnight.",
        "She could not remember where she had left the keys, so she looked under every chair in the house.",
    ],
    "de": [
        "Die Bibliothek öffnet um neun Uhr morgens und bleibt während der Prüfungen bis Mitternacht offen.",
        "Er wusste nicht mehr, wo er die Schlüssel gelassen hatte, und suchte unter jedem Stuhl im Haus.",
    ],
    "ja": ["図書館は朝九時に開きます。試験の間は真夜中まで開いているので、学生たちはそこで勉強します。"],
    "zh": ["图书馆早上九点开门、考试期间一直开放到半夜。所以很多学生都喜欢在那里一起学习和讨论问题。"],
    "ru": ["Библиотека открывается в девять часов утра и во время экзаменов работает до самой полуночи."],
}
DOCUMENTS = [Document(f"{language}{i}", text) for language, texts in TEXTS.items() for i, text in enumerate(texts)]


@pytest.mark.parametrize(("language", "text"), [(language, text) for language in TEXTS for text in TEXTS[language]])
def test_sentences_are_identified(language: str, text: str) -> None:
    identified, probability = identify(text)
    assert identified == language
    assert 0.5 < probability <= 1.0


@pytest.mark.parametrize("keep", [{"ko": 0.8}, {"en": 0.5, "ko": 0.8}, {"de": 0.5}])
def test_only_the_languages_to_keep_stay_and_the_others_are_counted(keep: dict[str, float]) -> None:
    tally = Tally()
    kept = LanguageFilter(LanguageConfig(keep=keep))(DOCUMENTS, tally)
    assert kept == [document for document in DOCUMENTS if document.id[:2] in keep]
    assert tally.dropped["language"].count == len(DOCUMENTS) - len(kept)
    assert len(tally.samples["language"]) > 0


def test_each_language_has_its_own_least_probability() -> None:
    text = "Die library opens um neun Uhr und the students bleiben until Mitternacht in the house"
    language, probability = identify(text)
    document, other = Document("mixed", text), {"en": "de", "de": "en"}[language]
    assert 0.0 < probability < 1.0
    for keep, stays in [
        ({language: probability, other: 1.0}, True),
        ({language: probability + 0.001, other: 0.0}, False),
        ({language: 0.0}, True),
    ]:
        assert bool(LanguageFilter(LanguageConfig(keep=keep))([document], Tally())) is stays


def test_without_languages_everything_stays() -> None:
    assert LanguageFilter(LanguageConfig())(DOCUMENTS, Tally()) == DOCUMENTS


def test_text_without_language_is_dropped_not_guessed() -> None:
    documents = [Document("digits", "12345 67890 !!! +++ 3.14159"), Document("one", "7")]
    assert LanguageFilter(LanguageConfig(keep={"en": 0.1, "ko": 0.1}))(documents, Tally()) == []


@pytest.mark.parametrize(("code", "nearest"), [("kor", "ko"), ("EN", "en"), ("deu", "de")])
def test_an_unknown_language_is_refused_with_the_nearest(code: str, nearest: str) -> None:
    with pytest.raises(
        UserError, match=rf"unknown language '{code}'; use an ISO 639 code such as .*\b{nearest}\b.* \("
    ):
        LanguageFilter(LanguageConfig(keep={code: 0.5}))


def test_an_excerpt_reads_the_beginning_the_middle_and_the_end() -> None:
    text = "a" * 5000 + "b" * 5000 + "c" * 5000
    assert excerpt(text) == "a" * 150 + "\n" + "b" * 150 + "\n" + "c" * 150
    assert excerpt("short") == "short"
    assert excerpt("x" * 450) == "x" * 450


def test_a_korean_page_under_an_english_menu_is_korean() -> None:
    menu = "Home | About us | Contact | Login | Terms of use | Sitemap | English | Search this site for anything\n" * 2
    assert identify(menu + "\n".join(TEXTS["ko"]) * 4)[0] == "ko"
