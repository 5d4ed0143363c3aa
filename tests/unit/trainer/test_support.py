"""What the tables promise: each rule refuses its example and only that, each way out is one, features all combine."""

from itertools import combinations
from typing import Any

import pytest

from parity import CASES, config_of
from trainer import rules, support
from trainer.config import RunConfig, UserError
from trainer.config_file import differences, from_tree
from trainer.support import FEATURES, RULES, Feature, Rule, Settings

EXAMPLES = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.statement.replace("`", ""))


def read(settings: Settings) -> RunConfig:
    """As if a config file said this and nothing else."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        tree.setdefault(section, {})[field] = value
    return from_tree(tree)


# -------------------------------------------------------------------------------------------------------------- rules


@EXAMPLES
def test_a_rule_and_no_other_refuses_its_example(rule: Rule) -> None:
    unchecked = rules.changed(RunConfig(), rule.example)
    assert [*rules.broken(unchecked, support.RULES)] == [rule]
    with pytest.raises(UserError) as caught:
        read(rule.example)
    assert str(caught.value) == rule.refusal(unchecked, support.RULES)


@EXAMPLES
def test_no_setting_of_an_example_can_be_left_out(rule: Rule) -> None:
    for left_out in rule.example:
        less = rules.changed(RunConfig(), {key: rule.example[key] for key in rule.example if key != left_out})
        assert [*rules.broken(less, support.RULES)] != [rule]


@EXAMPLES
def test_a_refusal_is_one_line_with_the_values_the_reason_and_each_way_out(rule: Rule) -> None:
    unchecked = rules.changed(RunConfig(), rule.example)
    message = rule.refusal(unchecked, support.RULES)
    assert "\n" not in message and rule.why in message
    ways_out = rule.alternatives(unchecked, support.RULES)
    assert ways_out
    for key, value in ways_out:
        assert key in message and rules.text_of(value) in message
    values = message.partition(": ")[0]
    fields = {key.partition(".")[2]: rules.text_of(value) for key, value in rule.example.items()}
    assert any(field in values for field in fields)
    for field, value in fields.items():
        assert field not in values or f"{field} {value}" in values


@EXAMPLES
def test_every_way_out_is_accepted(rule: Rule) -> None:
    for key, value in rule.alternatives(rules.changed(RunConfig(), rule.example), support.RULES):
        config = read({**rule.example, key: value})
        assert config == rules.changed(rules.changed(RunConfig(), rule.example), {key: value})


def test_no_rule_is_said_twice() -> None:
    assert len({rule.statement for rule in RULES}) == len(RULES)


# ----------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_a_feature_is_off_where_nothing_is_set_and_says_all_that_turns_it_on(feature: Feature) -> None:
    changes = differences(config_of("one rank"), config_of(feature.name))
    assert {change.key: change.new for change in changes} == dict(feature.settings)


def test_any_two_features_of_different_axes_are_accepted_together_and_compared() -> None:
    compared = 0
    for one, other in combinations(FEATURES.values(), 2):
        case = f"{one.name} + {other.name}"
        assert (case in CASES) == (one.axis != other.axis)
        if case in CASES:
            changes = {each.key: each.new for each in differences(config_of("one rank"), config_of(case))}
            assert changes == {**one.settings, **other.settings}
            compared += 1
    assert compared > 100


def test_settings_of_one_axis_are_no_settings_of_another() -> None:
    for one, other in support.pairs():
        assert not one.settings.keys() & other.settings.keys(), f"{one.name} and {other.name} cannot both be on"
