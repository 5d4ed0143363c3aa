"""Writes docs/layouts.md from the tables in trainer/support.py and the tolerances in tests/parity.py: `make docs`."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from parity import CASES, NUM_STEPS, TOLERANCES
from trainer import rules, support
from trainer.config import RunConfig
from trainer.support import FEATURES, RULES, Settings

TARGET = Path(__file__).with_suffix(".md")

HEADER = """\
# Layouts

What can be combined, and which values fit together. The tables on this page are those in `trainer/support.py`, from
which the config's refusals and the tests are generated too; `make docs` writes it.

## What can be combined

At most one value of each axis is on, and any two values of different axes combine, as long as the numbers fit together
([below](#which-values-fit-together)).

| axis | values, and the smallest settings that turn them on |
|---|---|"""

PROOF = """
`make parity` proves it: it trains {num_cases} combinations, among them every value alone and every pair of different
axes, and compares each over {num_steps} steps with a plain PyTorch GPT in one process that starts from the same weights
and reads the same batches. The largest relative differences that it accepts:

| arithmetic | loss | gradient norm | weights after the last step | biases (which start at zero) |
|---|---|---|---|---|"""

RULES_HEADER = """
## Which values fit together

A config that breaks a rule is refused, before any process starts, in one line: the values, the reason, and in each
direction the nearest setting that works with all the others. The examples are changes of the default config.

| rule | because | for example | is answered with |
|---|---|---|---|"""


def render() -> str:
    return "\n".join([HEADER, *_features(), *_tolerances(), RULES_HEADER, *_rules()]) + "\n"


def _features() -> Iterator[str]:
    for axis, features in groupby(FEATURES.values(), key=lambda feature: feature.axis):
        yield f"| {axis} | {'; '.join(f'{feature.name}: {_shown(feature.settings)}' for feature in features)} |"


def _tolerances() -> Iterator[str]:
    yield PROOF.format(num_cases=len(CASES), num_steps=NUM_STEPS)
    for precision, bounds in TOLERANCES.items():
        yield f"| {precision} | {' | '.join(f'{bound:.0e}' for bound in bounds.values())} |"


def _rules() -> Iterator[str]:
    for rule in RULES:
        refused = rules.changed(RunConfig(), rule.example)
        answer = f"use {rules.shown(rule.alternatives(refused, support.RULES))}"
        yield f"| {rule.statement} | {rule.why} | {_shown(rule.example)} | {answer} |"


def _shown(settings: Settings) -> str:
    return ", ".join(f"`{key}={rules.text_of(value)}`" for key, value in settings.items())


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
