"""Models of Hugging Face become folders to train from; an export too large to be opened is verified on a sample."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline.tokenization import Tokenizer as OurTokenizer
from data_pipeline.tokenization import train_tokenizer
from launcher.job.ranks import Ranks
from launcher.verbs import exporting, importing
from small_run import BROADGAUGE
from trainer import config_file
from trainer.checkpoint.format import store
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.format.manifest import read_manifest
from trainer.config import UserError
from trainer.config_file import from_tree
from trainer.data_config import TokenizerConfig
from trainer.presets import PRESETS
from trainer.run_dir import RunDir

ROOT = Path(__file__).parents[4]
VOCAB = 280
NUM_TENSORS = 108


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer: GPT-Neo of eight layers, heads of 8."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB,
        max_position_embeddings=24,
        hidden_size=32,
        num_layers=8,
        attention_types=[[["global", "local"], 4]],
        window_size=7,
        num_heads=4,
        bos_token_id=256,
        eos_token_id=256,
    )
    model = transformers.GPTNeoForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(weights: Path, tmp_path: Path) -> Path:
    """The model, with the tokenizer files of GPT-2's time."""
    folder = Path(shutil.copytree(weights, tmp_path / "some-gpt_neo"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>", "th", "the"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


class Told:
    """Hears of progress, which must rise to its total."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[int | None, str]] = {}
        """Of each thing done how much it was, in what unit."""
        self._done: dict[str, int] = {}

    def __call__(self, doing: str, done: int, total: int | None, unit: str) -> None:
        assert self.totals.setdefault(doing, (total, unit)) == (total, unit)
        assert self._done.get(doing, -1) < done and (total is None or done <= total)
        self._done[doing] = done

    def all_is_done(self) -> bool:
        return all(self._done[doing] == (total or 0) for doing, (total, _) in self.totals.items())


def test_an_import_is_all_that_training_needs(theirs: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "import", Told()
    imported = importing.import_model(str(theirs), out, update=told)
    assert told.totals == {"import: reading": (NUM_TENSORS, "tensors"), "import: committing": (1, "files")}
    assert told.all_is_done()
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "step-00000000", "tokenizer"]
    assert imported.tokenizer_problem is None and imported.architecture == "GPTNeoForCausalLM"
    config = config_file.load(imported.config_path)
    assert config.name == "some-gpt_neo" and config.model.attention_window == 7
    assert store.find(Path(str(config.checkpoint.weights_from))) == imported.checkpoint
    manifest = read_manifest(imported.checkpoint)
    assert from_tree(manifest.config).model == config.model and manifest.origin == str(theirs)
    tokenizer = OurTokenizer.load(Path(str(config.data.tokenizer.path)), "reference")
    assert tokenizer.encode_batch(["the"]).ids.tolist() == [258] and tokenizer.end_of_text_id == 256
    assert manifest.data == {"tokenizer": tokenizer.fingerprint}
    with pytest.raises(UserError, match="import exists already; name another folder"):
        importing.import_model(str(theirs), out)


def test_a_tokenizer_json_stays_as_it_is(weights: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(weights, tmp_path / "theirs"))
    Tokenizer(models.WordLevel({"</s>": 0, "word": 1}, unk_token="word")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    imported = importing.import_model(str(folder), tmp_path / "import")
    assert imported.tokenizer_problem is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "import" / "tokenizer" / name).read_bytes() == (folder / name).read_bytes()


def test_a_sentencepiece_model_is_written_as_the_same_tokenizer(weights: Path, tmp_path: Path) -> None:
    folder, trained = Path(shutil.copytree(weights, tmp_path / "theirs")), tmp_path / "trained"
    train_tokenizer(["a b c d"] * 9, TokenizerConfig(kind="sentencepiece_bpe"), 290, trained, seq_length=24)
    shutil.copyfile(trained / "tokenizer.model", folder / "tokenizer.model")
    imported = importing.import_model(str(folder), tmp_path / "import")
    written = (tmp_path / "import" / "tokenizer" / "tokenizer.json").read_bytes()
    assert imported.tokenizer_problem is None and written == (trained / "tokenizer.json").read_bytes()


def test_weights_are_imported_without_a_tokenizer_that_can_be_used(weights: Path, tmp_path: Path) -> None:
    imported = importing.import_model(str(weights), tmp_path / "none")
    assert "cannot be read (No such file or directory)" in str(imported.tokenizer_problem)
    assert not (tmp_path / "none" / "tokenizer").exists()
    assert config_file.load(imported.config_path).data.tokenizer.path is None
    endless = Path(shutil.copytree(weights, tmp_path / "endless"))
    Tokenizer(models.WordLevel({"word": 0}, unk_token="word")).save(str(endless / "tokenizer.json"))
    (endless / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    imported = importing.import_model(str(endless), tmp_path / "import")
    assert "has no <|endoftext|> or </s> token" in str(imported.tokenizer_problem)
    assert read_manifest(imported.checkpoint).data == {}


def test_what_an_interrupted_import_left_is_written_over(theirs: Path, tmp_path: Path) -> None:
    out = tmp_path / "import"
    whole = dict(GlobalTensors(importing.import_model(str(theirs), out).checkpoint))
    (out / "step-00000000").rename(out / "step-00000000.tmp")
    again = dict(GlobalTensors(importing.import_model(str(theirs), out).checkpoint))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    (out / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists already"):
        importing.import_model(str(theirs), out)


def import_offline(cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [BROADGAUGE, "import", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_model_of_the_hub_is_found_in_its_cache(theirs: Path, tmp_path: Path) -> None:
    cache, commit = tmp_path / "cache", "0" * 40
    model = cache / "models--somebody--some-gpt"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(theirs, model / "snapshots" / commit)
    done = import_offline(cache, "--progress", "json", "somebody/some-gpt", "--out", tmp_path / "import")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["kind"] for line in (said[0], said[-1])] == ["stage_started", "stage_finished"]
    ends = {
        line["doing"]: line["done"] for line in said if line["kind"] == "progress" and line["done"] == line["total"]
    }
    assert ends == {"import: reading": NUM_TENSORS, "import: committing": 1}
    assert done.stdout.startswith(f"{tmp_path}/import/step-00000000: a GPTNeoForCausalLM; train on from it with")
    assert config_file.load(tmp_path / "import" / "config.yaml").name == "somebody-some-gpt"
    assert read_manifest(tmp_path / "import" / "step-00000000").origin == "somebody/some-gpt"
    missing = import_offline(cache, "somebody/another", "--out", tmp_path / "other")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert missing.stderr.startswith("error: somebody/another is no folder here, not in the hub's cache, and the hub")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("no/such/folder", None, "is neither a folder nor the name"),
        (".", "main", "is a folder, which has no revisions"),
    ],
)
def test_a_source_that_cannot_be_one(source: str, revision: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        importing.import_model(source, tmp_path / "import", revision)


# ------------------------------------------------------------------------------------------------------- verification


def test_memory_decides_how_an_export_is_verified() -> None:
    model = from_tree({"model": PRESETS["gpt3_xl"]()["model"]}).model  # 5.3 GB in fp32
    gigabyte = 10**9
    assert exporting.method("auto", model, 12 * gigabyte) == "sample"
    assert exporting.method("auto", model, 14 * gigabyte) == "full"
    assert exporting.method("full", model, gigabyte) == "full"
    assert [exporting.pairs_that_fit(model, room * gigabyte) for room in (1, 3, 4, 5, 12)] == [1, 1, 2, 3, 3]
    assert gigabyte / 10 < exporting.available_bytes() < 10**14


def no_ranks() -> Ranks:
    raise AssertionError("a sample needs no ranks of the run")


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_sample_is_verified_without_the_runs_ranks(dtype: Any, theirs: Path, tmp_path: Path) -> None:
    imported = importing.import_model(str(theirs), tmp_path / "import")
    out, run_dir = tmp_path / "export", RunDir(tmp_path / "scratch")
    tokenizer = tmp_path / "import" / "tokenizer"
    told = Told()
    verified = exporting.export_checkpoint(
        imported.config, run_dir, no_ranks, imported.checkpoint, tokenizer, out, {}, dtype, "sample", told
    )
    assert told.all_is_done() and told.totals == {
        "export: writing": (NUM_TENSORS, "tensors"),
        "export: comparing": (52, "tensors"),
        "export: computing logits": (None, "tokens"),
        "export: comparing logits": (48, "tokens"),
    }
    card = (out / "README.md").read_text().partition("## Verification")[2]
    assert verified.how == "sample" and verified.num_tokens == 48 and verified.largest_difference is not None
    assert (verified.largest_difference < 1e-4) == (dtype == "fp32")
    assert "52 of 108 tensors" in card and "cut down to layers 1, 2, " in card and "48 tokens drawn at random" in card
    assert ("rounded to bfloat16" in card) == (dtype == "bf16")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
