"""The dashboard is what the metrics say of themselves."""

import json
from typing import Any

import pytest

from monitoring_tools import MONITORING, generator, names
from trainer.metrics import NODE, RUN, Metric

BOARD = json.loads((MONITORING / "dashboards" / "broadgauge.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"].replace("$__rate_interval", "2m") for target in panel["targets"]]


def test_it_is_up_to_date() -> None:
    made = generator("dashboard")
    assert made.TARGET.read_text() == made.render(), "run `make docs`"


@pytest.mark.parametrize("metric", [*NODE, *RUN], ids=lambda metric: metric.series)
def test_every_metric_is_seen_and_explained(metric: Metric) -> None:
    showing = [panel for panel in PANELS if any(metric.series in names(each) for each in expressions(panel))]
    assert showing, f"{metric.series} is in no panel of k8s/monitoring/dashboard.py"
    assert any(metric.help in panel["description"] for panel in showing)


def test_units_are_those_of_the_metrics() -> None:
    by_title = {panel["title"]: panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS}
    assert by_title["Step duration"] == "s" and by_title["Run disk free"] == "bytes"
    assert by_title["MFU"] == "percentunit" and by_title["Loss"] == "short"
    assert by_title["Phases of a step"] == "s" and by_title["Checkpoint saved"] == "Bps"


def test_panels_are_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_every_panel_asks_the_chosen_source_for_the_chosen_runs() -> None:
    assert [each["name"] for each in BOARD["templating"]["list"]] == ["datasource", "run"]
    for panel in PANELS:
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}"
        assert all('run=~"$run"' in each for each in expressions(panel)), panel["title"]
