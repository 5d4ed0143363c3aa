"""Whether a checkpoint fits a run: its architecture, its tokenizer and data, its place in the schedule."""

from collections.abc import Mapping
from pathlib import Path

from trainer.checkpoint.format.manifest import Manifest
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.config_file import differences, from_tree
from trainer.schedule import Schedule
from trainer.training_state import STATE_KINDS


def check_architecture(manifest: Manifest, config: RunConfig, checkpoint: Path) -> None:
    """Raises:
    UserError: names the model fields in which the checkpoint differs from the config.
    """
    theirs = from_tree(manifest.config | {"preset": None})
    changed = [
        f"{each.key} is {each.old} in the checkpoint and {each.new} in the config"
        for each in differences(_written_out(config, theirs.model), _written_out(config, config.model))
        if each.key not in ("model.dropout", "model.init_std")  # these shape the training, not what the weights mean
    ]
    if changed:
        raise UserError(f"{checkpoint} is of another architecture ({'; '.join(changed)}); use its own config")


def _written_out(config: RunConfig, model: ModelConfig) -> RunConfig:
    """With nothing left to defaults: an empty width and the same width written out are one architecture."""
    widths = {"ffn_hidden_size": model.ffn_size, "num_kv_heads": model.kv_heads}
    return config.model_copy(update={"model": model.model_copy(update=widths)})


def check_start(manifest: Manifest, config: RunConfig, data: Mapping[str, str], path: Path) -> None:
    """Whether a run can start from the checkpoint that its config names.

    Raises:
        UserError: says what differs.
    """
    if config.checkpoint.resume_from:
        check_continues(manifest, config, path)
    else:
        check_architecture(manifest, config, path)
    is_known = bool(manifest.data or config.checkpoint.resume_from)  # not of weights imported without a tokenizer
    if data and is_known:  # data may be still to be prepared
        check_tokenizer(manifest, data, path)


def check_continues(manifest: Manifest, config: RunConfig, checkpoint: Path) -> None:
    """Whether a run can go on from a checkpoint and mean the same by its steps.

    Raises:
        UserError: says what differs.
    """
    check_architecture(manifest, config, checkpoint)
    if set(STATE_KINDS) - set(manifest.kinds):
        raise UserError(
            f"{checkpoint} holds weights and no optimizer state; begin a run with them by checkpoint.weights_from"
        )
    schedule, train = Schedule(config), config.train
    expected = schedule.consumed_samples(manifest.step)
    if manifest.consumed_samples != expected:
        start = train.ramp_start_batch_size
        ramp = f" after a ramp from {start} over {train.ramp_tokens} tokens" if start else ""
        raise UserError(
            f"{checkpoint} has consumed {manifest.consumed_samples} sequences in {manifest.step} steps, and with "
            f"train.global_batch_size {train.global_batch_size}{ramp} they would be {expected}; use its own batch "
            "size and ramp"
        )
    if manifest.step >= schedule.num_steps:
        raise UserError(
            f"{checkpoint} is of step {manifest.step} and the run ends at step {schedule.num_steps}; raise "
            f"train.total_tokens above {schedule.consumed_tokens(manifest.step)}"
        )


def check_tokenizer(manifest: Manifest, data: Mapping[str, str], checkpoint: Path) -> None:
    """Raises:
    UserError: the data was tokenized otherwise than what the checkpoint was trained on.
    """
    theirs, ours = manifest.data.get("tokenizer"), data.get("tokenizer")
    if theirs != ours:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer (xxh3-128 {theirs}, the data's is {ours}); use data that "
            "was prepared with the same one"
        )


def check_same_data(manifest: Manifest, found: Mapping[str, str], folder: Path, checkpoint: Path) -> None:
    """Whether a position in the data means what it meant when a checkpoint was written.

    Raises:
        UserError: it does not.
    """
    trained_on = manifest.data
    if {**trained_on, "blend": None} != {**found, "blend": None}:
        raise UserError(f"{folder} has changed since {checkpoint} was written; bring the old data back")
    if trained_on.get("blend") != found.get("blend"):
        raise UserError(
            f"{checkpoint} was trained on the blend {trained_on.get('blend')}, and that of {folder} is now "
            f"{found.get('blend')}; bring the old weights back"
        )
