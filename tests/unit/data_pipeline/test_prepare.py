import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import xxhash
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_pipeline.building import PreparationFailed
from data_pipeline.manifest import DatasetManifest, FileRecord, Manifest
from data_pipeline.pipeline import prepare
from data_pipeline.tokenization import Tokenizer, train_bpe
from inline_workers import InlineWorkers
from trainer.config import DataConfig, UserError
from trainer.data.prepared import PreparedFolder
from trainer.data.token_bytes import token_bytes

VOCAB_SIZE = 320
SEQ_LENGTH = 32
FILES = {
    "text/train.bin",
    "text/train.idx",
    "text/heldout.bin",
    "text/heldout.idx",
    "text/dropped.jsonl",
    "text/manifest.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
}


def prepare_small(out: Path, *sources: Path | str, vocab_size: int = VOCAB_SIZE, **rest: Any) -> Manifest:
    settings = {"heldout_fraction": 0.1} | {key: rest.pop(key) for key in set(rest) & set(DataConfig.model_fields)}
    named = {"sources": tuple(map(str, sources))} if sources else {}
    data = DataConfig.model_validate(named | settings)
    rest.setdefault("workers", InlineWorkers())
    return prepare(data, vocab_size=vocab_size, seq_length=SEQ_LENGTH, out=out, **rest)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(out: Path, portion: str, dataset: str = "text") -> list[str]:
    """Every document of a shard, read by megatron-core and decoded, without its end-of-text token."""
    tokenizer = Tokenizer.load(out / "tokenizer")
    dataset = IndexedDataset(str(out / dataset / portion))
    documents = [dataset[i] for i in range(len(dataset))]
    assert all(tokens[-1] == tokenizer.end_of_text_id for tokens in documents)
    return [tokenizer.decode(tokens[:-1]) for tokens in documents]


def source_texts(folder: Path) -> list[str]:
    books = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("books/*.txt"))]
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
    return books + [orjson.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def prepared(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "data"
    prepare_small(out, corpus_folder)
    return out


def test_every_document_is_in_exactly_one_split_and_reads_back_in_order(prepared: Path, corpus_folder: Path) -> None:
    train, heldout = texts_of(prepared, "train"), texts_of(prepared, "heldout")
    texts = source_texts(corpus_folder)
    assert sorted(train + heldout) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert 5 <= len(heldout) <= 25, "a tenth of 150 documents, give or take"


def test_the_manifest_tells_what_is_there(prepared: Path, corpus_folder: Path) -> None:
    manifest = Manifest.load(prepared)
    assert set(manifest.files) == FILES == set(content_of(prepared)) - {"manifest.json", ".prepare.lock"}
    for name, content in content_of(prepared).items():
        if name in FILES:
            assert manifest.files[name].size_bytes == len(content)
    for portion, record in manifest.datasets["text"].items():
        texts = texts_of(prepared, portion)
        assert record.documents == len(texts)
        assert record.text_bytes == sum(len(text.encode()) for text in texts)
        assert record.tokens * 2 == manifest.files[f"text/{portion}.bin"].size_bytes
    assert manifest.portions == manifest.datasets["text"]
    assert manifest.tokenizer_fingerprint == manifest.files["tokenizer/tokenizer.json"].xxh3_128
    assert manifest.vocab_size == VOCAB_SIZE
    assert (manifest.dropped, manifest.repaired, manifest.notes) == ({}, {}, [])
    manifest.verify(prepared)


def test_tokens_in_shards_spell_the_bytes_that_the_manifest_counts(prepared: Path) -> None:
    lengths = token_bytes(PreparedFolder.open(prepared))
    assert lengths is not None
    for portion, record in Manifest.load(prepared).datasets["text"].items():
        tokens = np.fromfile(prepared / "text" / f"{portion}.bin", np.uint16)
        assert lengths[tokens].sum() == record.text_bytes


def test_a_data_sets_manifest_tells_where_it_came_from(prepared: Path, corpus_folder: Path) -> None:
    manifest = DatasetManifest.load(prepared / "text")
    assert manifest.portions == Manifest.load(prepared).datasets["text"]
    assert sum(source.documents for source in manifest.sources) == 150
    raw = {str(path): xxhash.xxh3_128_hexdigest(path.read_bytes() + b"\0") for path in corpus_folder.glob("*.jsonl")}
    assert raw.items() <= {source.place: source.content_hash for source in manifest.sources}.items()
    for name, record in manifest.files.items():
        assert record == FileRecord.of(prepared / "text" / name)


def test_the_tokenizer_has_seen_the_training_split_only(prepared: Path, tmp_path: Path) -> None:
    train_bpe(texts_of(prepared, "train"), VOCAB_SIZE, tmp_path, SEQ_LENGTH)
    assert (tmp_path / "tokenizer.json").read_bytes() == (prepared / "tokenizer/tokenizer.json").read_bytes()


def test_preparing_elsewhere_gives_the_same_bytes(prepared: Path, corpus_folder: Path, tmp_path: Path) -> None:
    prepare_small(tmp_path / "again", corpus_folder)
    assert content_of(tmp_path / "again") == content_of(prepared)


def test_preparing_again_touches_nothing(prepared: Path, corpus_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert prepare_small(prepared, corpus_folder) == Manifest.load(prepared)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_a_documents_split_does_not_depend_on_its_neighbours(
    prepared: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    prepare_small(tmp_path / "less", corpus_folder / "part0.jsonl")
    assert set(texts_of(tmp_path / "less", "heldout")) < set(texts_of(prepared, "heldout"))
    prepare_small(tmp_path / "reseeded", corpus_folder, seed=1)
    assert set(texts_of(tmp_path / "reseeded", "heldout")) != set(texts_of(prepared, "heldout"))


def test_drops_and_repairs_are_counted_in_the_manifest(corpus_folder: Path, tmp_path: Path) -> None:
    messy = tmp_path / "messy.jsonl"
    lines = [
        {"text": "sneaky <|endoftext|> and <|endoftext|>"},
        {"text": " \n"},
        {"text": "cafe\u0301"},
        {"text": "café"},  # the one above, composed
        {"no": 1},
    ]
    encoded = [*map(orjson.dumps, lines), b'{"text": "half \\ud83d"}']
    messy.write_bytes(b"\n".join(encoded) + b"\n")
    places = [f"{messy}@{sum(len(line) + 1 for line in encoded[:number])}" for number in range(len(encoded))]
    out = tmp_path / "out"
    totals = prepare_small(out, corpus_folder, messy)
    manifest = DatasetManifest.load(out / "text")
    assert totals.dropped == {"duplicate": 1, "empty_text": 1, "missing_field": 1}
    assert {reason: (count.count, count.places) for reason, count in manifest.dropped.items()} == {
        "empty_text": (1, [places[1]]),
        "duplicate": (1, [places[3]]),
        "missing_field": (1, [places[4]]),
    }
    assert {reason: (count.count, count.places) for reason, count in manifest.repaired.items()} == {
        "control_token": (2, [places[0]]),
        "not_nfc": (1, [places[2]]),
        "lone_surrogates": (1, [places[5]]),
    }
    texts = texts_of(out, "train") + texts_of(out, "heldout")
    assert {"sneaky < |endoftext|> and < |endoftext|>", "café", "half \ufffd"} <= set(texts)
    assert Manifest.load(out) == totals


def test_an_existing_tokenizer_is_used_as_it_is(prepared: Path, corpus_folder: Path, tmp_path: Path) -> None:
    manifest = prepare_small(
        tmp_path / "out", corpus_folder, tokenizer=str(prepared / "tokenizer"), vocab_size=VOCAB_SIZE + 50
    )
    assert manifest.tokenizer_fingerprint == Manifest.load(prepared).tokenizer_fingerprint
    assert manifest.vocab_size == VOCAB_SIZE
    assert (tmp_path / "out/text/train.bin").read_bytes() == (prepared / "text/train.bin").read_bytes()


def test_another_tokenizer_than_the_datas_is_refused(prepared: Path, corpus_folder: Path, tmp_path: Path) -> None:
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out"
    shutil.copytree(prepared / "tokenizer", tokenizer)
    prepare_small(out, corpus_folder, tokenizer=str(tokenizer))
    train_bpe(["other text to learn from"] * 99, 270, tokenizer, SEQ_LENGTH)
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was prepared with"):
        prepare_small(out, corpus_folder, tokenizer=str(tokenizer))
    shutil.rmtree(tokenizer)
    prepare_small(out, corpus_folder, tokenizer=str(tokenizer))  # what is prepared needs it no more


class Recorder:
    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int | None, str]] = []

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        self.updates.append((stage, done, total, unit))


@pytest.mark.parametrize("stage", ["clean", "train tokenizer", "tokenize"])
def test_progress_rises_to_its_total(
    stage: str, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.cleaning._BATCH_CHARS", 5_000)
    progress = Recorder()
    prepare_small(tmp_path / "out", corpus_folder, progress=progress)
    updates = [update for update in progress.updates if update[0].startswith(f"{stage}:")]
    assert len(updates) > 5
    done = [done for _, done, _, _ in updates]
    assert done == sorted(done)
    assert {total for _, _, total, _ in updates} == {updates[0][2]}
    assert done[-1] == updates[0][2] or stage == "train tokenizer"  # which leaves out what is held out


def test_the_size_of_a_batch_does_not_change_the_bytes(
    prepared: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.cleaning._BATCH_CHARS", 1)
    prepare_small(tmp_path / "out", corpus_folder)
    assert content_of(tmp_path / "out") == content_of(prepared)


def test_the_number_of_processes_does_not_change_the_bytes(prepared: Path, corpus_folder: Path, tmp_path: Path) -> None:
    for num_workers in (1, 3):
        prepare_small(tmp_path / f"{num_workers}", corpus_folder, workers=num_workers)
        assert content_of(tmp_path / f"{num_workers}") == content_of(prepared)


def test_what_an_interrupted_preparation_of_other_settings_left_is_replaced(
    prepared: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    prepare_small(tmp_path, corpus_folder, vocab_size=300)
    (tmp_path / "manifest.json").unlink()
    prepare_small(tmp_path, corpus_folder)
    assert content_of(tmp_path) == content_of(prepared)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_data_of_other_settings_is_refused_with_both_values(prepared: Path, corpus_folder: Path) -> None:
    before = content_of(prepared)
    with pytest.raises(UserError, match=rf"vocab_size {VOCAB_SIZE} here, 300 asked for.*use another folder"):
        prepare_small(prepared, corpus_folder, vocab_size=300)
    assert content_of(prepared) == before


def test_a_folder_of_other_things_is_refused_and_kept(corpus_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/precious.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="holds files that are no prepared data"):
        prepare_small(tmp_path, corpus_folder)
    assert content_of(tmp_path) == {"tokenizer/precious.txt": b"precious"}


def test_a_folder_that_cannot_be_made_is_refused(corpus_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        prepare_small(tmp_path / "file", corpus_folder)
    with pytest.raises(UserError, match="cannot be written"):
        prepare_small(tmp_path / "file/below", corpus_folder)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"vocab_size": 200}, "model.vocab_size 200 is less than the 257"),
        ({"tokenizer": "/nowhere"}, "/nowhere/tokenizer.json cannot be read"),
        ({"sources": ["/nowhere"]}, "/nowhere does not exist"),
    ],
)
def test_what_can_be_seen_to_fail_is_refused_before_anything_is_written(
    settings: dict[str, Any], rule: str, corpus_folder: Path, tmp_path: Path
) -> None:
    sources = settings.pop("sources", [corpus_folder])
    with pytest.raises(UserError) as refusal:
        prepare_small(tmp_path / "out", *sources, **settings)
    assert rule in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"min_train_tokens": 10**6}, "tokens and one batch needs 1000000; add text, or lower"),
        ({"heldout_fraction": 1e-9}, "the held-out text has 0 tokens in 0 of 150 documents"),
        ({"vocab_size": 50_000}, "model.vocab_size 50000 is more than the"),
    ],
)
def test_a_corpus_too_small_is_refused_and_nothing_published(
    settings: dict[str, Any], rule: str, corpus_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        prepare_small(tmp_path, corpus_folder, **settings)
    assert rule in str(refusal.value)
    assert not (tmp_path / "manifest.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {".prepare.lock", ".work"}, "what was done is kept, apart"


def test_prepared_data_is_too_small_for_a_larger_batch(prepared: Path, corpus_folder: Path) -> None:
    with pytest.raises(UserError, match="one batch needs 1000000"):
        prepare_small(prepared, corpus_folder, min_train_tokens=10**6)


def test_a_corpus_without_one_usable_document_is_refused_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n{"text": ""}\n{"text": " "}\n')
    with pytest.raises(UserError) as refusal:
        prepare_small(tmp_path / "out", tmp_path)
    assert "no usable text" in str(refusal.value)
    assert f"empty_text 2 (first at {tmp_path}/a.jsonl@14), missing_field 1 (first at" in str(refusal.value)


def test_text_that_changes_while_it_is_read_is_refused(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.cleaning._BATCH_CHARS", 1000)
    source = tmp_path / "a.jsonl"
    source.write_bytes((corpus_folder / "part0.jsonl").read_bytes())

    class Meddler:
        def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
            with open(source, "r+b") as handle:
                handle.write(b" ")

    with pytest.raises(PreparationFailed, match="has changed while it was read"):
        prepare_small(tmp_path / "out", source, progress=Meddler())
    assert not (tmp_path / "out/manifest.json").exists()


def test_two_processes_cannot_prepare_one_folder(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Intruder:
        def __init__(self) -> None:
            self.refusals: list[str] = []

        def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
            with pytest.raises(UserError) as refusal:
                prepare_small(out, corpus_folder)
            self.refusals.append(str(refusal.value))

    intruder = Intruder()
    prepare_small(out, corpus_folder, progress=intruder)
    assert intruder.refusals
    assert all("is being prepared by another process" in refusal for refusal in intruder.refusals)


# ------------------------------------------------------------------------------------------------------------ damage


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "rule"), [(Path.unlink, "is missing"), (cut_short, "bytes, not"), (flip_a_bit, "other content")]
)
@pytest.mark.parametrize(
    "name", ["text/train.bin", "text/heldout.idx", "tokenizer/tokenizer.json", "text/manifest.json"]
)
def test_damage_is_named_and_mended(
    damage: Callable[[Path], None], rule: str, name: str, prepared: Path, corpus_folder: Path
) -> None:
    before = content_of(prepared)
    damage(prepared / name)
    (problem,) = Manifest.load(prepared).damage(prepared)
    assert name in problem and rule in problem
    with pytest.raises(UserError, match="is damaged"):
        Manifest.load(prepared).verify(prepared)
    prepare_small(prepared, corpus_folder)
    assert content_of(prepared) == before


def test_a_file_that_has_not_changed_is_read_once_a_command(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, read = Manifest.load(prepared), []
    of = FileRecord.of
    monkeypatch.setattr(FileRecord, "of", lambda path, heard: read.append(path.name) or of(path, heard))
    for name in manifest.files:  # as copied just now: nobody has read them
        path = prepared / name
        path.with_suffix(".copy").write_bytes(path.read_bytes())
        path.with_suffix(".copy").rename(path)
    manifest.verify(prepared)
    manifest.verify(prepared)
    assert sorted(read) == sorted(Path(name).name for name in manifest.files)


def test_damaged_data_is_not_replaced_by_other_text(corpus_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes((corpus_folder / "part0.jsonl").read_bytes())
    prepare_small(out, source)
    (out / "text/train.bin").unlink()
    source.write_bytes((corpus_folder / "part1.jsonl").read_bytes())
    before = content_of(out)
    with pytest.raises(UserError, match="is damaged and its text has changed"):
        prepare_small(out, source)
    assert before.items() <= content_of(out).items()


def test_a_folder_without_manifest_and_one_with_another_file_under_its_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}', encoding="utf-8")
    with pytest.raises(UserError, match="is not a manifest of prepared data"):
        Manifest.load(tmp_path)


def test_file_records_hash_files_larger_than_one_read(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert FileRecord.of(tmp_path / "a") == FileRecord(
        size_bytes=3_000_000, xxh3_128=xxhash.xxh3_128_hexdigest(content)
    )
