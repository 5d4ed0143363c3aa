"""Data prepared through the command line by real worker processes: interrupted, on bad splits, with everything on."""

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil
import pytest

from data_pipeline.manifest import DatasetManifest, Manifest
from data_pipeline.sources import plan_splits
from prepare_command import (
    COMMAND,
    asked,
    content_of,
    environment,
    prepare_command,
    prepared,
    text,
    write_config,
    write_corpus,
    write_jsonl,
)
from trainer.config import DataConfig

NUM_KILLS = 2  # of the driver, a worker
COPIES: dict[str, object] = {"dedup": {"fuzzy": "standard", "paragraphs": True}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """Config, what an undisturbed run makes of it, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "config.yaml", sources=[str(corpus)], **COPIES)
    started = time.monotonic()
    out = prepared(config, folder / "out")
    return config, out, time.monotonic() - started


# ----------------------------------------------------------------------------------------------------------- kill -9


def kill_and_go_on(whole: tuple[Path, Path, float], out: Path, seed: int) -> None:
    """Kill the driver, or a worker, at a random moment; whatever is left to do is done by a second run."""
    config, undisturbed, seconds = whole
    draw = random.Random(seed)
    run = subprocess.Popen(
        [*COMMAND, str(config), "--out", str(out), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    time.sleep(draw.uniform(0.2, 1.0) * seconds)
    driver = psutil.Process(run.pid)
    workers = driver.children() if run.poll() is None else []
    victim = draw.choice(workers) if workers and seed % 2 else driver
    if victim.is_running():
        victim.kill()
    _, errors = run.communicate(timeout=60)
    assert run.returncode in ((0,) if victim is not driver else (0, -signal.SIGKILL)), errors.decode()
    prepared(config, out)
    assert content_of(out) == content_of(undisturbed), f"seed {seed}"


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_killed_driver_or_worker_changes_no_byte(seed: int, whole: tuple[Path, Path, float], tmp_path: Path) -> None:
    kill_and_go_on(whole, tmp_path / "out", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_KILLS, 60))
def test_many_more_of_these(seed: int, whole: tuple[Path, Path, float], tmp_path: Path) -> None:
    kill_and_go_on(whole, tmp_path / "out", seed)


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(whole: tuple[Path, Path, float], tmp_path: Path) -> None:
    config, undisturbed, _ = whole
    run = subprocess.Popen(
        [*COMMAND, str(config), "--out", str(tmp_path / "out"), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    while not (tmp_path / "out/.work").exists():
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted; run the same command again to go on" in errors and "Traceback" not in errors
    assert content_of(prepared(config, tmp_path / "out")) == content_of(undisturbed)


# -------------------------------------------------------------------------------------- what is done is not done again


def parts_of(out: Path) -> dict[str, int]:
    """Every finished part of the first pass, and when it was made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob(".work/*/clean/*/part.json")}


@dataclass(frozen=True)
class HalfDone:
    """A copy of the corpus, its config, and a folder in which one split has failed and all others are done."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def half_done_once(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[HalfDone, Path]:
    """And a copy of it, as it was."""
    made = HalfDone(tmp_path_factory.mktemp("half-done") / "run")
    made.folder.mkdir()
    source, out = made.corpus, made.out
    shutil.copytree(corpus, source)
    (source / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    config = write_config(made.config, sources=[str(source)], **COPIES)
    done = prepare_command(config, "--out", out, "--workers", 2)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert "1 of 7 splits failed and data.max_bad_splits allows 0" in line and "bad.parquet" in line
    assert len(parts_of(out)) == 6
    return made, Path(shutil.copytree(made.folder, made.folder.with_name("as-it-was")))


@pytest.fixture
def half_done(half_done_once: tuple[HalfDone, Path]) -> HalfDone:
    """Where it was made: a config and a manifest name their sources by their paths."""
    made, as_it_was = half_done_once
    shutil.rmtree(made.folder)
    shutil.copytree(as_it_was, made.folder)
    return made


def test_a_split_that_always_fails_is_named_and_may_be_allowed(half_done: HalfDone, tmp_path: Path) -> None:
    config, out = half_done.config, half_done.out
    before = parts_of(out)
    assert prepare_command(config, "--out", out, "--workers", 2).returncode == 1
    assert parts_of(out) == before, "what was done stays"
    done = prepare_command(config, "--out", out, "--workers", 2, "--set", "data.max_bad_splits=1")
    assert done.returncode == 0, done.stderr
    assert f"warning: {half_done.corpus}/bad.parquet is not in the data" in done.stdout
    (bad,) = Manifest.load(out).bad_splits
    assert bad.place == f"{half_done.corpus}/bad.parquet" and "arquet" in bad.reason
    assert not (out / ".work").exists()


def test_a_mended_split_joins_what_was_done(half_done: HalfDone, tmp_path: Path) -> None:
    """Decisions over the corpus without it, and a tokenizer trained on less, must not be taken for those with it."""
    config, out = half_done.config, half_done.out
    allowed = ("--set", "data.max_bad_splits=1", "model.vocab_size=100000")  # fails after the decisions
    assert prepare_command(config, "--out", out, *allowed[:2], "model.vocab_size=300").returncode == 0
    (half_done.corpus / "bad.parquet").unlink()
    write_jsonl(half_done.corpus / "mended.jsonl", [text(0), text(10_000)])  # a copy, which goes, and a new one
    again = prepared(config, tmp_path / "again")
    assert Manifest.load(again).dropped == {"duplicate": 1}
    assert Manifest.load(again).portions["train"].documents + Manifest.load(again).portions["heldout"].documents == 361


def test_of_an_edited_corpus_only_what_has_changed_is_done_again(half_done: HalfDone, tmp_path: Path) -> None:
    config, out = half_done.config, half_done.out
    before = parts_of(out)
    edited = half_done.corpus / "03.jsonl"
    edited.write_bytes(edited.read_bytes().replace(b'"text"', b'"text" ', 1) + orjson.dumps({"text": text(20_000)}))
    assert prepare_command(config, "--out", out, "--workers", 2).returncode == 1
    after = parts_of(out)
    assert before.items() - after.items() == set()
    assert len(after) == len(before) + 1
    allow = ("--set", "data.max_bad_splits=1")
    prepared(config, out, *allow)
    assert content_of(out) == content_of(prepared(config, tmp_path / "fresh", *allow))


@pytest.mark.slow
def test_a_corpus_that_has_moved_is_not_read_again(half_done: HalfDone, tmp_path: Path) -> None:
    config, out = half_done.config, half_done.out
    before = parts_of(out)
    half_done.corpus.rename(tmp_path / "elsewhere")
    moved = ("--set", f"data.sources={tmp_path}/elsewhere")
    assert prepare_command(config, "--out", out, *moved).returncode == 1
    assert parts_of(out) == before
    prepared(config, out, *moved, "data.max_bad_splits=1")
    fresh = prepared(config, tmp_path / "fresh", *moved, "data.max_bad_splits=1")
    for name in ("text/train.bin", "text/train.idx", "text/heldout.bin", "tokenizer/tokenizer.json"):
        assert (out / name).read_bytes() == (fresh / name).read_bytes()


def test_another_config_on_a_half_done_folder_gives_what_it_gives_elsewhere(
    half_done: HalfDone, tmp_path: Path
) -> None:
    config, out = half_done.config, half_done.out
    before = parts_of(out)
    other = ("--set", "data.max_bad_splits=1", "data.heldout_fraction=0.3")
    prepared(config, out, *other)
    assert len(before) == 6
    assert content_of(out) == content_of(prepared(config, tmp_path / "fresh", *other))


def test_a_file_that_vanishes_after_planning_fails_alone(corpus: Path, tmp_path: Path) -> None:
    from data_pipeline.building import PreparationFailed
    from data_pipeline.pipeline import prepare
    from data_pipeline.progress import NoProgress
    from data_pipeline.tasks import Done, Failed
    from data_pipeline.workers import LocalWorkers

    source = tmp_path / "corpus"
    shutil.copytree(corpus, source)

    class Thief(LocalWorkers):
        outcomes: tuple[Done | Failed, ...] = ()

        def run(self, tasks, on_advance):  # type: ignore[no-untyped-def]
            (source / "02.jsonl").unlink(missing_ok=True)
            self.outcomes = tuple(super().run(tasks, on_advance))
            return list(self.outcomes)

    data = DataConfig(sources=(str(source),), heldout_fraction=0.1)
    with Thief(2) as workers, pytest.raises(PreparationFailed, match=r"1 of 6 splits failed.*02\.jsonl: No such file"):
        prepare(data, vocab_size=300, seq_length=16, out=tmp_path / "out", workers=workers, progress=NoProgress())
    assert [isinstance(outcome, Failed) for outcome in workers.outcomes] == [False, False, True, False, False, False]
    assert len(parts_of(tmp_path / "out")) == 5


def test_two_commands_cannot_prepare_one_folder(whole: tuple[Path, Path, float], tmp_path: Path) -> None:
    config, undisturbed, _ = whole
    command = [*COMMAND, str(config), "--out", str(tmp_path / "out"), "--workers", "1"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())
    while not (tmp_path / "out/.work").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = prepare_command(config, "--out", tmp_path / "out", "--workers", 1)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert "is being prepared by another process; wait for it or stop it" in second.stderr
    assert first.wait(60) == 0
    assert content_of(tmp_path / "out") == content_of(undisturbed)


# ------------------------------------------------------------------------------------------------------ everything on

WORDS = """the house that we have seen with you and the man who came to be there by night is of good stone so they say
it has stood for a hundred years when rain was falling over hills fields rivers and every child in town knew its old
door she opened window after window until light fell upon table chair lamp book paper
where letters lay about some journey"""


def english(draw: random.Random, *num_words: int) -> str:
    """Paragraphs of so many words."""
    return "\n\n".join(" ".join(draw.choices(WORDS.split(), k=num)).capitalize() + "." for num in num_words)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets that share texts and paragraphs, evaluation texts that have leaked, and a classifier."""
    folder, draw = tmp_path_factory.mktemp("web"), random.Random(0)
    shared = [english(draw, 60, 40) for _ in range(40)]
    question = english(draw, 30)
    books = [*shared, *(english(draw, 80, 60) for _ in range(80))]
    leaked = "\n\n".join([english(draw, 200), question, english(draw, 200)])
    near = [f"{each[:-5]} zzz." for each in books[50:60]]
    partly = ["\n\n".join([english(draw, 80), each.splitlines()[0]]) for each in books[60:70]]
    spam = [english(draw, 20) + " buy cheap now click here" * 20 for _ in range(10)]
    foreign = ["안녕하세요 저는 오늘 학교에 가서 친구를 만났습니다. " * 20]
    crawl = [
        *shared,
        leaked,
        *near,
        *partly,
        *(english(draw, 90) for _ in range(80)),
        english(draw, 20),
        *spam,
        *foreign,
    ]
    write_jsonl(folder / "books/a.jsonl", books[:60])
    write_jsonl(folder / "books/b.jsonl", books[60:])
    write_jsonl(folder / "crawl/a.jsonl", crawl[:60])
    write_jsonl(folder / "crawl/b.jsonl", crawl[60:])
    write_jsonl(folder / "evaluation.jsonl", [question])
    write_jsonl(folder / "good.jsonl", [english(draw, 60) for _ in range(60)])
    write_jsonl(folder / "poor.jsonl", [english(draw, 5) + " buy cheap now click here" * 9 for _ in range(60)])
    done = prepare_command(
        *("train-classifier", "--positive", folder / "good.jsonl", "--negative", folder / "poor.jsonl"),
        *("--out", folder / "quality.npz"),
    )
    assert done.returncode == 0 and "quality.npz" in done.stdout, done.stderr
    return folder


def everything_on(web: Path, *names: str, **more: object) -> Path:
    datasets = {name: {"sources": [str(web / name)]} for name in names}
    return write_config(
        web / f"{'-'.join(names)}.yaml",
        datasets=datasets,
        blend=dict(zip(names, (3.0, 1.0), strict=True)),
        language={"keep": {"en": 0.5}},
        quality={"rules": ["gopher"], "classifier": str(web / "quality.npz"), "pareto_alpha": 1.0},
        dedup={"fuzzy": "standard", "paragraphs": True},
        decontaminate={"against": str(web / "evaluation.jsonl")},
        **more,
    )


def test_everything_at_once_gives_the_same_bytes_with_any_number_of_workers(web: Path, tmp_path: Path) -> None:
    config = everything_on(web, "books", "crawl")
    one = prepared(config, tmp_path / "one", workers=1)
    assert content_of(one) == content_of(prepared(config, tmp_path / "three", workers=3))
    manifest = Manifest.load(one)
    assert manifest.blend == {"books": 3.0, "crawl": 1.0}
    assert {"duplicate", "near_duplicate", "low_quality", "gopher_word_count", "language"} <= set(manifest.dropped)
    assert {"repeated_paragraph", "contaminated_span"} <= set(manifest.repaired)
    for name in ("books", "crawl"):
        read = len(
            (web / name / "a.jsonl").read_bytes().splitlines() + (web / name / "b.jsonl").read_bytes().splitlines()
        )
        dataset = DatasetManifest.load(one / name)
        pieces = dataset.repaired["contaminated_span"].count if "contaminated_span" in dataset.repaired else 0
        kept = sum(portion.documents for portion in dataset.portions.values())
        assert read == kept - pieces + sum(count.count for count in dataset.dropped.values())


@pytest.mark.parametrize("names", [("books", "crawl"), pytest.param(("crawl", "books"), marks=pytest.mark.slow)])
def test_of_texts_in_two_data_sets_the_copy_in_the_first_is_kept(
    names: tuple[str, str], web: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", datasets={name: {"sources": [str(web / name)]} for name in names})
    out = prepared(config, tmp_path / "out")
    first, second = (DatasetManifest.load(out / name) for name in names)
    assert first.dropped == {}
    assert {reason: count.count for reason, count in second.dropped.items()} == {"duplicate": 40}
    other = write_config(
        tmp_path / "other.yaml", datasets={name: {"sources": [str(web / name)]} for name in reversed(names)}
    )
    refused = asked(other, "--out", out)
    assert refused.returncode == 2
    assert "the order of data.datasets" in refused.stderr, "its copies would be kept elsewhere"


def test_a_data_set_that_ends_up_empty_is_noted(web: Path, tmp_path: Path) -> None:
    shutil.copytree(web / "books", tmp_path / "copies")
    datasets = {"books": {"sources": [str(web / "books")]}, "copies": {"sources": [str(tmp_path / "copies")]}}
    for number, more in enumerate(({}, {"tokenizer": str(tmp_path / "0/tokenizer")})):  # both ways to make tokens
        config = write_config(tmp_path / "config.yaml", datasets=datasets, **more)
        done = prepare_command(config, "--out", tmp_path / f"{number}", "--workers", 2)
        assert done.returncode == 0, done.stderr
        assert "note: data set copies has no training text left, and cannot be drawn from" in done.stdout
        assert Manifest.load(tmp_path / f"{number}").datasets["copies"]["train"].tokens == 0
        shown = asked("inspect", tmp_path / f"{number}", "--dataset", "copies")
        assert shown.returncode == 0 and "--- " not in shown.stdout


@pytest.mark.slow
def test_changed_evaluation_texts_are_looked_for_again(web: Path, tmp_path: Path) -> None:
    """What an interrupted run decided about the earlier ones is not used, down to which phrases are common."""
    shutil.copy(web / "evaluation.jsonl", tmp_path / "evaluation.jsonl")
    data: dict[str, object] = {
        "sources": [str(web / "crawl")],
        "decontaminate": {"against": str(tmp_path / "evaluation.jsonl")},
    }
    config = write_config(tmp_path / "config.yaml", **data)
    failing = prepare_command(config, "--out", tmp_path / "out", "--set", "model.vocab_size=90000")
    assert failing.returncode == 2 and "model.vocab_size 90000 is more than" in failing.stderr
    crawl = [orjson.loads(line)["text"] for line in (web / "crawl/a.jsonl").read_bytes().splitlines()]
    write_jsonl(tmp_path / "evaluation.jsonl", [crawl[0], crawl[0].splitlines()[0]])  # one phrase of all documents
    bigger = ("--set", "model.vocab_size=90000")
    assert prepare_command(config, "--out", tmp_path / "out", *bigger).returncode == 2
    assert content_of(prepared(config, tmp_path / "out")) == content_of(prepared(config, tmp_path / "fresh"))


def test_a_sentencepiece_tokenizer_end_to_end(web: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "config.yaml", sources=[str(web / "books")], tokenizer={"kind": "sentencepiece_unigram"}
    )
    out = prepared(config, tmp_path / "out", "--set", "model.vocab_size=400")
    assert (out / "tokenizer/tokenizer.model").exists() and Manifest.load(out).vocab_size == 400
    shown = asked("inspect", out, "--count", 1).stdout
    first = orjson.loads((web / "books/a.jsonl").read_bytes().splitlines()[0])["text"]
    assert "text, train, document 0" in shown
    assert any(text_of in shown for text_of in (first, first.splitlines()[0]))
    again = prepared(config, tmp_path / "again", "--set", "model.vocab_size=400", workers=1)
    assert content_of(out) == content_of(again)


def test_inspect_shows_documents_and_a_sample_of_what_was_dropped(web: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", sources=[str(web / "books"), str(web / "crawl")])
    out = prepared(config, tmp_path / "out")
    shown = asked("inspect", out, "--first", 1, "--count", 2).stdout
    assert "document 1 (" in shown and "document 2 (" in shown and "document 0 (" not in shown
    assert "heldout, document 0" in asked("inspect", out, "--heldout", "--count", 1).stdout
    dropped = asked("inspect", out, "--dropped", "duplicate").stdout
    assert dropped.count(": duplicate") == 5 and f"--- {web}/crawl/a.jsonl@0: duplicate" in dropped
    assert orjson.loads((web / "crawl/a.jsonl").read_bytes().splitlines()[0])["text"] in dropped
    refused = asked("inspect", out, "--dropped", "boredom")
    assert refused.returncode == 2 and "no document is dropped for 'boredom'" in refused.stderr


def test_the_plan_is_what_the_manifest_says(whole: tuple[Path, Path, float], corpus: Path) -> None:
    plan = plan_splits(DataConfig(sources=(str(corpus),)))
    assert [s.split for s in DatasetManifest.load(whole[1] / "text").sources] == [split.id for split in plan.splits]
