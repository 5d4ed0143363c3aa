"""The contract on disk between what prepares data and training, and what a checkpoint remembers of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import xxhash

from data_pipeline.shards import ShardWriter, TokenBatch
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data.prepared import PreparedFolder, fingerprints

SEQ = 4


def config_of(blend: dict[str, float] | None = None) -> RunConfig:
    return from_tree({"model": {"seq_length": SEQ}, "data": {"prepared": "anywhere", "blend": blend}})


def write_manifest(folder: Path, **content: Any) -> None:
    (folder / "manifest.json").write_bytes(orjson.dumps(content))


def write_prepared(folder: Path, blend: dict[str, float] | None = None, **windows: int) -> None:
    """A folder as the contract has it, in full."""
    files, datasets = {}, {}
    for name, num_windows in windows.items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "heldout"):
            with ShardWriter(folder / name / split, 1000, end_of_text_id=0) as writer:
                writer.add(TokenBatch.of([np.full(num_windows * SEQ, 7, np.uint16)]))
                writer.finish()
                writer.commit()
            content = (folder / name / f"{split}.bin").read_bytes()
            files[f"{name}/{split}.bin"] = {"size_bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        counts = {"documents": 1, "tokens": num_windows * SEQ + 1, "text_bytes": 9}
        datasets[name] = {"train": counts, "heldout": counts}
    write_manifest(
        folder, datasets=datasets, tokenizer_fingerprint="aa", blend=blend, files=files, made_with="a test", more=[1]
    )


def test_a_folder_of_several_data_sets(tmp_path: Path) -> None:
    write_prepared(tmp_path, {"web": 3, "books": 1}, web=5, books=2)
    folder = PreparedFolder.open(tmp_path)
    assert list(folder.datasets.items()) == [("web", tmp_path / "web"), ("books", tmp_path / "books")]
    assert folder.train_tokens() == {"web": 5 * SEQ + 1, "books": 2 * SEQ + 1}
    assert folder.blend == {"web": 3, "books": 1}
    assert folder.blend_for(config_of()).describe() == "web 49152, books 16384 of 65536"


def test_a_folder_of_other_tools(tmp_path: Path) -> None:
    folder = PreparedFolder.open(tmp_path)
    assert folder.datasets == {"text": tmp_path} and folder.blend is None
    assert fingerprints(config_of(), tmp_path) == {}


def test_fingerprints_of_a_single_data_set_are_those_of_the_first_version(tmp_path: Path) -> None:
    """Old checkpoints hold them; a manifest of that version knows no data sets."""
    write_prepared(tmp_path, text=5)
    expected = xxhash.xxh3_128_hexdigest((tmp_path / "text" / "train.bin").read_bytes())
    assert fingerprints(config_of(), tmp_path) == {"tokenizer": "aa", "train": expected}
    assert fingerprints(config_of({"text": 3.0}), tmp_path) == {"tokenizer": "aa", "train": expected}
    write_manifest(tmp_path, tokenizer_fingerprint="aa", files={"train.bin": {"xxh3_128": "bb", "bytes": 3}}, more=1)
    assert fingerprints(config_of(), tmp_path) == {"tokenizer": "aa", "train": "bb"}


def test_fingerprints_of_several_data_sets_cover_each_and_the_blend(tmp_path: Path) -> None:
    write_prepared(tmp_path, web=5, books=3)
    as_prepared = fingerprints(config_of(), tmp_path)
    assert as_prepared.keys() == {"tokenizer", "train", "blend"}
    assert as_prepared["blend"] == "web 40960, books 24576 of 65536"
    assert fingerprints(config_of({"web": 50, "books": 30}), tmp_path) == as_prepared  # the same blend
    reweighted = fingerprints(config_of({"web": 1, "books": 1}), tmp_path)
    assert {key for key in as_prepared if as_prepared[key] != reweighted[key]} == {"blend"}

    manifest = orjson.loads((tmp_path / "manifest.json").read_bytes())
    for name in ("web", "books"):
        changed = orjson.loads(orjson.dumps(manifest))
        changed["files"][f"{name}/train.bin"]["xxh3_128"] = "cc"
        write_manifest(tmp_path, **changed)
        found = fingerprints(config_of(), tmp_path)
        assert {key for key in as_prepared if as_prepared[key] != found[key]} == {"train"}


def test_a_blend_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_prepared(tmp_path, web=5, books=3)
    with pytest.raises(UserError, match="there is no data set book; known: web, books"):
        fingerprints(config_of({"web": 1, "book": 1}), tmp_path)


FILES = {"a/train.bin": {"xxh3_128": "bb"}}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"tokenizer_fingerprint": "aa"}', b"\xff", b"null"]
    + [
        orjson.dumps({"tokenizer_fingerprint": "aa", "files": files, "datasets": datasets})
        for files, datasets in (({}, {"a": {}}), (FILES, {"a": {}, "b": {}}), (FILES, {}), (FILES, 3), ([], {"a": {}}))
    ],
)
def test_a_manifest_that_cannot_be_understood(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest of prepared data; prepare it again"):
        fingerprints(config_of(), tmp_path)


def test_looking_at_prepared_data_takes_no_torch() -> None:
    """The launcher does, before a rank starts."""
    code = "import sys; import trainer.data.prepared; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
