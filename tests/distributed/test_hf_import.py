"""Training goes on from an imported model in any layout: the first loss is transformers' own, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ranks import run_on_ranks
from trainer import parallel
from trainer.checkpoint import sharded
from trainer.checkpoint.format import store
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.format.manifest import Manifest, read_manifest
from trainer.checkpoint.huggingface import checkpoint_weights, configs, export, importing
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.checkpoint.huggingface.verification import check_tensors
from trainer.checkpoint.waiting_save import save
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data.batches import MicroBatch
from trainer.engine.engine import Engine
from trainer.plan import num_parameters

VOCAB, SEQ = 90, 20  # 90 tokens pad to 128 rows
TOLERANCE = 1e-6  # relative, fp32
SIZES = {"num_layers": 4, "hidden_size": 48, "num_heads": 6, "vocab_size": VOCAB, "seq_length": SEQ}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "GPT-1": {"norm_placement": "post"},
    "GPT-Neo": {"biases": "all_but_qkv", "attention_window": 7},
    "Llama": {
        "positions": "rotary",
        "norm": "rms",
        "activation": "swiglu",
        "biases": "none",
        "num_kv_heads": 2,
        "tied_embeddings": False,
    },
}
LAYOUTS = {"one rank": {}, "TP2 x PP2": {"tensor": 2, "pipeline": 2}}


def config_of(layout: str, **model: Any) -> RunConfig:
    train = {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
    return from_tree({"model": SIZES | model, "train": train, "parallel": LAYOUTS[layout]})


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """[batch, s + 1] tokens."""
    return torch.randint(VOCAB, (4, SEQ + 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of every family a model of transformers' making, of random weights, and its import."""
    root, made = tmp_path_factory.mktemp("imports"), {}
    for name, changes in FAMILIES.items():
        model = config_of("one rank", **changes).model
        family = family_of(model)
        torch.manual_seed(3)
        theirs = getattr(transformers, family.architecture)(configs.class_config(family, model))
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                parameter.normal_(1.0 if "ln_" in key or "norm" in key else 0.0, 0.1)
        theirs.save_pretrained(root / name / "theirs")
        found, settings = configs.read_config(root / name / "theirs")
        config = from_tree({"model": settings.model_dump(mode="json")})
        checkpoint = importing.import_weights(root / name / "theirs", found, config, root / name, "theirs", {})
        made[name] = (root / name / "theirs", checkpoint)
    return made


@torch.no_grad()
def their_loss(folder: Path, windows: Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = model(windows[:, :-1]).logits
    return model.loss_function(logits, None, vocab_size=VOCAB, shift_labels=windows[:, 1:].contiguous()).item()


def starting(checkpoints: dict[str, Path], windows: Tensor, saved: Path) -> Callable[[RunConfig, torch.device], Any]:
    """A rank that starts from each of the imports, saves it as it is, and takes a step; returns the losses."""

    def rank(config: RunConfig, device: torch.device) -> dict[str, float]:
        losses = {}
        for name, checkpoint in checkpoints.items():
            mine = config.model_copy(update={"model": from_tree({"model": SIZES | FAMILIES[name]}).model})
            engine = Engine(mine, device)
            sharded.load_initial_weights(engine, checkpoint)
            assert engine.state.num_updates == 0
            save(engine, saved / name, Manifest(1, 4, mine.model_dump(mode="json")))
            batches = windows.view(-1, parallel.data_size(), mine.train.micro_batch_size, SEQ + 1)
            stats = engine.train_step([MicroBatch(tokens) for tokens in batches[:, parallel.data_rank()]], 1e-3, 0)
            losses[name] = stats.loss
        return losses

    return rank


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_loss_is_transformers_own(
    layout: str, imports: dict[str, tuple[Path, Path]], windows: Tensor, tmp_path: Path
) -> None:
    checkpoints = {name: checkpoint for name, (_, checkpoint) in imports.items()}
    losses = run_on_ranks(config_of(layout), starting(checkpoints, windows, tmp_path))[0]
    for name, (theirs, checkpoint) in imports.items():
        assert losses[name] == pytest.approx(their_loss(theirs, windows), rel=TOLERANCE), name
        assert abs(losses[name] - 4.5) > 0.01, "that of uniform guesses would show nothing"
        _check_nothing_is_lost(tmp_path / name / store.folder_name(1), checkpoint, theirs, tmp_path / name)


def _check_nothing_is_lost(saved: Path, checkpoint: Path, theirs: Path, scratch: Path) -> None:
    """What the ranks saved is, to the last bit, what was imported, and so is what they saved once exported."""
    weights = dict(GlobalTensors(checkpoint))
    _assert_same_bits(dict(GlobalTensors(saved)), weights)
    config = from_tree(read_manifest(saved).config)
    family = family_of(config.model)
    slabs = family.slabs(config.model, configs.shapes_of(family, config.model))
    (scratch / "export").mkdir()
    reader = checkpoint_weights.CheckpointWeights(saved)
    export.write_weights(scratch / "export", reader, config.model, slabs, torch.float32)
    found = check_tensors(scratch / "export", saved, config.model, torch.float32, seed=1, sample=None)
    assert found.num_tensors == found.of_tensors and found.num_elements == num_parameters(config.model)
    if family.architecture != "GPTNeoForCausalLM":  # what its queries lost by rounding stays with the import
        _assert_same_bits(load_file(scratch / "export" / "model.safetensors"), load_file(theirs / "model.safetensors"))
    back = importing.import_weights(scratch / "export", family, config, scratch / "back", "export", {})
    _assert_same_bits(dict(GlobalTensors(back)), weights)


def _assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def test_another_architecture_is_refused_by_name(imports: dict[str, tuple[Path, Path]]) -> None:
    def rank(config: RunConfig, device: torch.device) -> str:
        engine = Engine(config, device)
        with pytest.raises(UserError) as caught:
            sharded.load_initial_weights(engine, imports["GPT-2"][1])
        return str(caught.value)

    (message,) = run_on_ranks(config_of("one rank", tied_embeddings=False), rank)
    assert "model.tied_embeddings is True in the checkpoint and False in the config" in message
