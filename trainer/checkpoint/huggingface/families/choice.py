"""Which family a model belongs to."""

from trainer.checkpoint.huggingface.families.family import Family, Requirement
from trainer.checkpoint.huggingface.families.gpt1 import GPT1
from trainer.checkpoint.huggingface.families.gpt2 import GPT2
from trainer.checkpoint.huggingface.families.gpt_neo import GPT_NEO
from trainer.checkpoint.huggingface.families.llama import LLAMA
from trainer.config import ModelConfig, UserError

FAMILIES = (GPT_NEO, GPT2, GPT1, LLAMA)
"""No two hold the same model; the first is named first where several are equally near."""


def family_of(model: ModelConfig) -> Family:
    """The one family whose class computes what this model does.

    Raises:
        UserError: none does; names the fewest settings that would change that.
    """
    unmet = {family.architecture: family.unmet(model) for family in FAMILIES}
    for family in FAMILIES:
        if not unmet[family.architecture]:
            return family
    fewest = min(map(len, unmet.values()))
    nearest = {name: changes for name, changes in unmet.items() if len(changes) == fewest}
    fields = dict.fromkeys(change.field for changes in nearest.values() for change in changes)
    values = ", ".join(f"model.{field} {_text(getattr(model, field))}" for field in fields)
    ways_out = " or ".join(f"{_settings(changes)} ({name})" for name, changes in nearest.items())
    raise UserError(f"no class of Hugging Face computes what this model does ({values}); nearest: {ways_out}")


def _settings(changes: list[Requirement]) -> str:
    return " and ".join(f"model.{change.field} {change.wanted}" for change in changes)


def _text(value: object) -> str:
    return "null" if value is None else str(value)
