"""Rules are tested by promtool, on series of runs in every state: see `rules/*.test.yaml`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubernetes_tools import kustomized, validate
from monitoring_tools import MONITORING, RULES, RUNBOOKS, alerts, generator, problems, promtool, rules

CASES = sorted((Path(__file__).parent / "rules").glob("*.test.yaml"))


def cases() -> Iterator[dict[str, Any]]:
    for path in CASES:
        yield from yaml.safe_load(path.read_text())["tests"]


def checks(alert: str) -> list[dict[str, Any]]:
    return [each for case in cases() for each in case["alert_rule_test"] if each["alertname"] == alert]


def test_rules_are_valid() -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name.partition(".")[0])
def test_alerts_fire_when_they_are_to(path: Path) -> None:
    tested = promtool("test", "rules", path.name, folder=path.parent)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(alert: str) -> None:
    fired = [expected for each in checks(alert) for expected in each.get("exp_alerts", [])]
    assert fired
    for expected in fired:
        assert expected["exp_labels"].keys() >= {"severity", "run"}
        assert expected["exp_annotations"].keys() == {"summary", "description", "runbook"}
    (case,) = (case for case in cases() if alert in {each["alertname"] for each in case["alert_rule_test"]})
    runs = set(re.findall(r'run="([^"]+)"', str(case["input_series"])))
    assert len(runs - {expected["exp_labels"]["run"] for expected in fired}) >= 2, "no runs for which it must not fire"


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_says_what_somebody_needs_who_is_woken(alert: str) -> None:
    rule = alerts()[alert]
    assert alert.startswith("Broadgauge") and rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("page", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert "$labels.run" in rule["annotations"]["summary"]
    assert "$value" in rule["annotations"]["description"]
    assert rule["annotations"]["runbook"] == f"docs/runbooks/{alert}.md"
    assert (RUNBOOKS / f"{alert}.md").is_file()


def test_series_of_the_cases_are_such_as_runs_have() -> None:
    series = {each["series"] for case in cases() for each in case["input_series"]}
    assert not [f"{each}: {problems(each)}" for each in series if problems(each) and 'job="node"' not in each]


def test_recorded_series_say_by_which_labels_and_of_what() -> None:
    for rule in rules():
        if "record" in rule:
            assert re.fullmatch(r"run(_\w+)?:broadgauge_\w+:\w+", rule["record"])


def test_rules_for_the_operator_are_those_for_prometheus() -> None:
    made = generator("prometheus_rule")
    assert made.TARGET.read_text() == made.render(), "run `make docs`"
    assert yaml.safe_load(made.render())["spec"] == yaml.safe_load(RULES.read_text())


def test_rules_for_the_operator_are_by_its_schema() -> None:
    validate(yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text()))


def test_a_cluster_gets_rules_and_dashboard() -> None:
    manifests = {each["kind"]: each for each in kustomized("monitoring")}
    assert manifests.keys() == {"PrometheusRule", "ConfigMap"}
    assert manifests["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert manifests["ConfigMap"]["data"] == {
        "broadgauge.json": (MONITORING / "dashboards" / "broadgauge.json").read_text()
    }
