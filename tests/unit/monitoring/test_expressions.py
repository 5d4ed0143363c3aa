"""Every expression of rules, dashboard and runbooks can be parsed, and names what there is."""

import json
import re
from pathlib import Path

import pytest
import yaml

from monitoring_tools import MONITORING, RUNBOOKS, names, problems, promtool, recorded, rules


def of_rules() -> list[str]:
    return [rule["expr"] for rule in rules()]


def of_dashboard() -> list[str]:
    board = json.loads((MONITORING / "dashboards" / "broadgauge.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    annotations = [each["expr"] for each in board["annotations"]["list"]]
    filled_in = {"$run": ".*", "$__rate_interval": "2m", "$__range": "6h"}
    expressions = [*panels, *annotations]
    for variable, value in filled_in.items():
        expressions = [each.replace(variable, value) for each in expressions]
    return expressions


def of_runbooks() -> list[str]:
    """A line each."""
    blocks = [
        block
        for page in sorted(RUNBOOKS.glob("*.md"))
        for block in re.findall(r"^```promql\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    ]
    return [line for block in blocks for line in block.splitlines()]


SOURCES = {"rules": of_rules, "dashboard": of_dashboard, "runbooks": of_runbooks}


@pytest.mark.parametrize("source", SOURCES)
def test_expressions_can_be_parsed(source: str, tmp_path: Path) -> None:
    expressions = SOURCES[source]()
    assert len(expressions) > 20 and not [each for each in expressions if "$" in each]
    made = [{"record": f"checked:{index}", "expr": each} for index, each in enumerate(expressions)]
    path = tmp_path / "expressions.rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": source, "rules": made}]}))
    checked = promtool("check", "rules", str(path))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_expressions_name_what_there_is(source: str) -> None:
    assert not {each: problems(each) for each in SOURCES[source]() if problems(each)}


def test_metrics_that_runbooks_mention_are_there() -> None:
    for page in RUNBOOKS.glob("*.md"):
        for mentioned in re.findall(r"`((?:run\w*:)?broadgauge_[\w:]+)", page.read_text()):
            assert not problems(mentioned), f"{page.name}: {problems(mentioned)}"


def test_everything_recorded_is_used() -> None:
    everywhere = {name for source in SOURCES.values() for each in source() for name in names(each)}
    assert recorded() <= everywhere


def test_the_check_sees_what_is_not_there() -> None:
    assert names('sum by (run) (rate(a_total{b="c{d}"}[5m] offset 1h)) / on (run) group_left (e) run:f:max > 2e3') == {
        *("a_total", "run:f:max")
    }
    assert problems("max(broadgauge_lost)") == ["broadgauge_lost is not declared"]
    assert problems('broadgauge_loss{state="training"}') == ["broadgauge_loss has no label state"]
    assert problems('broadgauge_run_state{state=~"training|trainin"}') == [
        'broadgauge_run_state is never state="trainin"'
    ]
    assert problems('run_reason:broadgauge_restarts_total:max{reason="rang"}') == [
        'run_reason:broadgauge_restarts_total:max is never reason="rang"'
    ]
