"""The export, opened by transformers in a process that cannot import this project."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from data_pipeline.tokenization import train_tokenizer
from parity import reference_of
from reference_gpt import ReferenceGPT
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.huggingface import export, generation, model_card
from trainer.checkpoint.huggingface.verification import ExportMismatch, check_logits
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data_config import TokenizerConfig
from weights import write_checkpoint

VOCAB, SEQ = 300, 24  # the padded vocabulary has 384 rows
SIZES = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 96}
END_OF_TEXT = "<|endoftext|>"
PROMPT = "the cat 1984"
FACTS = {"Steps": 1200, "Final loss": 3.14159265, "Layout": "TP2 | PP2"}

LLAMA = {"num_kv_heads": 2, "positions": "rotary", "norm": "rms", "activation": "swiglu", "biases": "none"}

VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: (class of transformers, changes to the model, max_shard_bytes)
    "tied": ("GPT2LMHeadModel", {}, 10**9),
    "untied": ("GPT2LMHeadModel", {"tied_embeddings": False}, 10**9),
    "sharded": ("GPT2LMHeadModel", {"tied_embeddings": False}, 60_000),
    "default_ffn": ("GPT2LMHeadModel", {"ffn_hidden_size": None, "dropout": 0.1}, 10**9),
    "gpt1": ("OpenAIGPTLMHeadModel", {"norm_placement": "post", "ffn_hidden_size": None, "dropout": 0.1}, 10**9),
    "gpt_neo": ("GPTNeoForCausalLM", {"biases": "all_but_qkv", "attention_window": 7, "dropout": 0.1}, 10**9),
    "llama": ("LlamaForCausalLM", LLAMA | {"dropout": 0.1}, 10**9),
    "llama_sharded": ("LlamaForCausalLM", LLAMA | {"tied_embeddings": False}, 40_000),
}
ONE_OF_EACH = ("tied", "gpt1", "gpt_neo", "llama")

# What a stranger would write: no file, path or module of ours.
STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("trainer", "launcher", "data_pipeline", "reference_gpt"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging

logging.disable_progress_bar()
folders, prompt, out = sys.argv[1:-2], sys.argv[-2], sys.argv[-1]
tokens = torch.load(out + "/tokens.pt")
results = {}
for folder in folders:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    generate = pipeline("text-generation", model=folder)
    end_of_text = generate.tokenizer.eos_token_id
    sampled = generate(
        prompt,
        max_length=len(ids) + 8,
        num_return_sequences=3,
        no_repeat_ngram_size=2,
        pad_token_id=end_of_text,
        return_tensors=True,
    )
    greedy = generate(prompt, do_sample=False, max_new_tokens=5, return_tensors=True)
    results[folder] = {
        "sampled": [each["generated_token_ids"] for each in sampled],
        "greedy": greedy[0]["generated_token_ids"],
        "generated": generate(prompt, max_length=len(ids) + 3, num_return_sequences=2),
        "logits": model(tokens).logits.detach(),
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "report": {name: sorted(map(str, keys)) for name, keys in report.items()},
        "eos": (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id),
        "ids": ids,
        "text": tokenizer.decode(ids),
    }
torch.save(results, out + "/results.pt")
"""


@dataclass
class Export:
    folder: Path
    checkpoint: Path
    reference: ReferenceGPT


def config_of(**model: Any) -> RunConfig:
    return from_tree({"name": "small", "model": {"vocab_size": VOCAB, "seq_length": SEQ, **SIZES, **model}})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that splits words otherwise than GPT-2 does, so that GPT-2's in its place would show."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, the cat sat on the mat in 1984 1984 1984"] * 4, trainer)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": SEQ}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Export]:
    root, checkpoints = tmp_path_factory.mktemp("exports"), tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name, (_, changes, max_shard_bytes) in VARIANTS.items():
        config = config_of(**changes)
        reference = reference_of(config.model)
        reference.randomize(seed=7)
        checkpoint = write_checkpoint(checkpoints / name, config, reference.global_tensors())
        temporary = export.export_model(
            checkpoint, config, tokenizer, root / name, FACTS, max_shard_bytes=max_shard_bytes
        )
        assert temporary.parent == root and not (root / name).exists()
        export.commit(temporary, root / name)
        made[name] = Export(root / name, checkpoint, reference)
    assert sorted(path.name for path in root.iterdir()) == sorted(VARIANTS)
    return made


@pytest.fixture(scope="module")
def seen_by_stranger(
    exports: dict[str, Export], tokens: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("stranger")
    torch.save(tokens, out / "tokens.pt")
    folders = [str(case.folder) for case in exports.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *folders, PROMPT, str(out)],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    results = torch.load(out / "results.pt")
    return {name: results[str(case.folder)] for name, case in exports.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stranger_sees_the_trained_model(
    variant: str,
    exports: dict[str, Export],
    seen_by_stranger: dict[str, dict[str, Any]],
    tokens: Tensor,
) -> None:
    seen = seen_by_stranger[variant]
    assert (seen["class"], seen["dtype"]) == (VARIANTS[variant][0], "torch.float32")
    assert not any(seen["report"].values())
    assert seen["logits"].shape == (2, SEQ, VOCAB)
    with torch.no_grad():
        expected = exports[variant].reference(tokens)
    assert expected.std() > 0.1, "logits that hardly vary would show nothing"
    torch.testing.assert_close(seen["logits"], expected, atol=1e-5, rtol=0)


def test_a_stranger_sees_the_tokenizer(seen_by_stranger: dict[str, dict[str, Any]], tokenizer: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end_of_text = backend.token_to_id(END_OF_TEXT)
    for seen in seen_by_stranger.values():
        assert seen["ids"] == backend.encode(PROMPT).ids
        assert seen["text"] == PROMPT
        assert seen["eos"] == (end_of_text, end_of_text, end_of_text)


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_a_stranger_generates_as_with_any_gpt2(
    variant: str, exports: dict[str, Export], seen_by_stranger: dict[str, dict[str, Any]]
) -> None:
    """And is warned of nothing: see the fixture, which finds standard error empty."""
    seen = seen_by_stranger[variant]
    prompt, end_of_text = seen["ids"], seen["eos"][0]
    assert len(seen["sampled"]) == 3 and len({tuple(ids) for ids in seen["sampled"]}) > 1
    for ids in seen["sampled"]:
        assert ids[: len(prompt)] == prompt and len(prompt) < len(ids) <= len(prompt) + 8
        bigrams = list(itertools.pairwise(ids[: (*ids, end_of_text).index(end_of_text)]))  # padded after its end
        assert len(bigrams) == len(set(bigrams))
    assert len(seen["generated"]) == 2 and all(each["generated_text"].startswith(PROMPT) for each in seen["generated"])
    tokens = list(prompt)
    while len(tokens) < len(prompt) + 5 and tokens[-1] != end_of_text:
        with torch.no_grad():
            tokens.append(int(exports[variant].reference(torch.tensor([tokens]))[0, -1].argmax()))
    assert seen["greedy"] == tokens


@pytest.mark.parametrize("variant", ["sharded", "llama_sharded"])
def test_shards_and_their_index_agree(variant: str, exports: dict[str, Export]) -> None:
    folder, limit = exports[variant].folder, VARIANTS[variant][2]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not (folder / "model.safetensors").exists()
    held: dict[str, str] = {}
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            sizes = {name: shard.get_tensor(name).nbytes for name in shard.keys()}  # noqa: SIM118  (not a dict)
        assert sum(sizes.values()) <= limit
        total += sum(sizes.values())
        held |= dict.fromkeys(sizes, path.name)
    assert len(set(held.values())) > 3
    assert index == {"metadata": {"total_size": total}, "weight_map": held}


def test_model_card_tells_the_facts(exports: dict[str, Export], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exports["tied"].folder, folder)
    model_card.add_verification(folder, "Logits within 3.5e-07 over 4,096 tokens.")
    card = (folder / "README.md").read_text()
    for line in ("# small", "| Steps | 1,200 |", "| Final loss | 3.14159 |", r"| Layout | TP2 \| PP2 |"):
        assert line in card.splitlines()
    assert card.endswith("## Verification\n\nLogits within 3.5e-07 over 4,096 tokens.\n")
    assert "  hidden_size: 32\n" in card, "the config"


def test_model_card_says_nothing_of_where_things_lie() -> None:
    places: dict[str, dict[str, Any]] = {
        "data": {
            "datasets": {"web": {"sources": ["https://secret:token@host/a.jsonl", "s3://b/secret?sig=secret"]}},
            "quality": {"classifier": "/secret/classifier"},
            "decontaminate": {"against": ["/secret/evaluations"]},
            "tokenizer": {"path": "/secret/tokenizer"},
        },
        "checkpoint": {
            "upload_to": "s3://secret/run",
            "snapshots_in": "/secret",
            "resume_from": "/secret/step-00000001",
        },
    }
    config = from_tree({"name": "public", **places})
    facts = [
        model_card.training_facts(Manifest(3, 48, config.model_dump(mode="json"), origin=origin))
        for origin in ("/secret/weights/theirs", "../secret/theirs", "somebody/theirs@main")
    ]
    assert [each["Weights began as"] for each in facts] == ["theirs", "theirs", "somebody/theirs@main"]
    card = model_card.model_card(config, "GPT2LMHeadModel", torch.float32, facts[0], config)
    assert "secret" not in card and "num_layers: 12\n" in card and "total_tokens" in card and "tensor: 1\n" in card


def test_model_card_names_the_class_and_what_it_has_of_its_own(exports: dict[str, Export]) -> None:
    cards = {name: (case.folder / "README.md").read_text() for name, case in exports.items()}
    for name, card in cards.items():
        assert f"as a `{VARIANTS[name][0]}`" in card
        assert ("Key-value heads | 2 |" in card) == name.startswith("llama")
        assert ("Attention window of every second layer, tokens | 7 |" in card) == (name == "gpt_neo")


def test_a_sentencepiece_tokenizer_is_exported_in_both_its_forms(tmp_path: Path, exports: dict[str, Export]) -> None:
    folder, out = tmp_path / "tokenizer", tmp_path / "export"
    text = "the model reads a token and then another one"
    train_tokenizer([text] * 9, TokenizerConfig(kind="sentencepiece_bpe"), 298, folder, SEQ)
    export.commit(export.export_model(exports["tied"].checkpoint, config_of(), folder, out, {}), out)
    opened = transformers.AutoTokenizer.from_pretrained(out)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    for sample in (text, "  odd  spaces ", "déjà vu"):
        assert opened(sample, add_special_tokens=False)["input_ids"] == reference.encode(sample)
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == settings["pad_token_id"] == reference.eos_id() == opened.eos_token_id


# ---------------------------------------------------------------------------------------------------------- verifying


def test_verify_returns_the_largest_difference(exports: dict[str, Export], tokens: Tensor) -> None:
    case = exports["sharded"]
    with torch.no_grad():
        logits = case.reference(tokens)
    assert check_logits(case.folder, logits, tokens).largest < 1e-5
    logits[1, 5, 7] += 5e-5
    assert check_logits(case.folder, logits, tokens).largest == pytest.approx(5e-5, abs=1e-5)
    logits[1, 5, 7] += 2e-4
    with pytest.raises(ExportMismatch, match=r"by up to 0\.00025 over 48 tokens, and 0\.0001 is allowed"):
        check_logits(case.folder, logits, tokens)
    logits[0, 0, 0] = float("nan")
    with pytest.raises(ExportMismatch, match="inf"):
        check_logits(case.folder, logits, tokens)


def corrupt_value(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40  # in the exponent of the last float: the final norm's bias
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_layer(folder: Path) -> None:
    change_config(folder, n_layer=2)


def add_layer(folder: Path) -> None:
    change_config(folder, n_layer=4)


def widen(folder: Path) -> None:
    change_config(folder, n_inner=128)


def use_other_activation(folder: Path) -> None:
    change_config(folder, activation_function="gelu")


@pytest.mark.parametrize(
    "damage",
    [corrupt_value, truncate, remove_weights, drop_layer, add_layer, widen, use_other_activation],
    ids=lambda damage: damage.__name__,
)
def test_verify_refuses_a_damaged_export(
    damage: Any, exports: dict[str, Export], tokens: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exports["tied"].folder, folder)
    with torch.no_grad():
        logits = exports["tied"].reference(tokens)
    check_logits(folder, logits, tokens)
    damage(folder)
    with pytest.raises(ExportMismatch):
        check_logits(folder, logits, tokens)


# --------------------------------------------------------------------------------------------------- what is refused


def test_a_model_that_no_class_computes_is_refused_before_anything_is_written(tokenizer: Path, tmp_path: Path) -> None:
    config = config_of(attention_window=8)
    with pytest.raises(UserError, match=r"biases all, .* model\.biases all_but_qkv \(GPTNeoForCausalLM\)"):
        export.export_model(tmp_path, config, tokenizer, tmp_path / "export", {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_never_replaced(tokenizer: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    (theirs / "README.md").write_text("My thesis.")
    for attempt in (
        lambda: export.export_model(tmp_path, config_of(), tokenizer, theirs, {}),
        lambda: export.commit(tmp_path / "unused", theirs),
    ):
        with pytest.raises(UserError, match="is not an export of Broadgauge"):
            attempt()
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "README.md"]


def test_a_second_export_replaces_the_first(exports: dict[str, Export], tokenizer: Path, tmp_path: Path) -> None:
    config, out = config_of(), tmp_path / "export"
    for steps in (1, 2):
        export.commit(export.export_model(exports["tied"].checkpoint, config, tokenizer, out, {"Steps": steps}), out)
    assert "| Steps | 2 |" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_tokenizer_must_fit_the_model(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 2\d\d tokens and model\.vocab_size is 256"):
        export.export_model(tmp_path, config_of(vocab_size=256), tokenizer, tmp_path / "export", {})
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        export.export_model(tmp_path, config_of(), tmp_path, tmp_path / "export", {})
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_generate_is_seeded(variant: str, exports: dict[str, Export]) -> None:
    folder = exports[variant].folder
    random_state = torch.get_rng_state()
    first, again, other = (generation.generate(folder, PROMPT, 8, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert not first.startswith(PROMPT)
    assert torch.equal(torch.get_rng_state(), random_state)


NOISY = """
import sys
from pathlib import Path
import torch
from trainer.checkpoint.huggingface import generation
from trainer.checkpoint.huggingface.verification import ExportMismatch, check_logits
from trainer.config import UserError

good, damaged = map(Path, sys.argv[1:])
generation.generate(good, "hello", 8, seed=1)
try:
    generation.generate(good, "hello " * 100, 8, seed=1)
except UserError:
    print("refused")
try:
    check_logits(damaged, torch.zeros(1, 2, 300), torch.zeros(1, 2, dtype=torch.long))
except ExportMismatch:
    print("refused")
"""


@pytest.mark.slow
def test_transformers_prints_nothing(exports: dict[str, Export], tmp_path: Path) -> None:
    """Neither for a prompt it finds too long, nor for weights it misses, nor bars while it loads."""
    folder = tmp_path / "damaged"
    shutil.copytree(exports["tied"].folder, folder)
    add_layer(folder)
    command = [sys.executable, "-c", NOISY, str(exports["tied"].folder), str(folder)]
    done = subprocess.run(command, cwd=Path(export.__file__).parents[3], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\nrefused\n", "")


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_generate_stops_where_the_context_ends(variant: str, exports: dict[str, Export], tokenizer: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    prompt = "0" * (SEQ - 1)
    assert len(backend.encode(prompt).ids) == SEQ - 1
    text = generation.generate(exports[variant].folder, prompt, 1000, seed=1)
    assert len(text) <= max(len(token) for token in backend.get_vocab()), "there was room for one token"
    with pytest.raises(UserError, match=rf"the prompt has {SEQ} tokens.* at most {SEQ} .* to {SEQ - 1} tokens"):
        generation.generate(exports[variant].folder, prompt + "0", 1, seed=1)


def test_generate_says_what_is_missing(exports: dict[str, Export], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no exported model"):
        generation.generate(tmp_path, PROMPT, 8, seed=1)
    with pytest.raises(UserError, match="the prompt is empty"):
        generation.generate(exports["tied"].folder, "", 8, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "transformers cannot open"),
        ("model.safetensors", b"\xff" * 99, "transformers cannot open"),
        ("config.json", b"{", "transformers cannot open"),
        ("tokenizer*", None, "knows no token of the prompt; see whether its files are all there"),
    ],
)
def test_generate_says_what_is_broken(
    name: str, content: bytes | None, message: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(exports["tied"].folder, folder)
    for path in folder.glob(name):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        generation.generate(folder, PROMPT, 8, seed=1)
    assert "\n" not in str(refused.value)
