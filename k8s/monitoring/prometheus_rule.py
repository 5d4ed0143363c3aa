"""Writes prometheus-rule.yaml, the rules as the Prometheus operator takes them, from rules/: `make docs`."""

from pathlib import Path

SOURCE = Path(__file__).parent / "rules" / "broadgauge.rules.yaml"
TARGET = Path(__file__).parent / "prometheus-rule.yaml"

HEADER = """\
# Made from rules/broadgauge.rules.yaml by `make docs`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: broadgauge
  labels:
    app.kubernetes.io/part-of: broadgauge
spec:
"""


def render() -> str:
    """As text, so that what the rules say of themselves comes along."""
    _, _, groups = SOURCE.read_text(encoding="utf-8").partition("\ngroups:\n")
    indented = (f"  {line}" if line else "" for line in f"groups:\n{groups}".splitlines())
    return HEADER + "\n".join(indented) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
