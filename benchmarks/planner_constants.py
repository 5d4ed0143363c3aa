"""Chooses the planner's constants: `python -m benchmarks.planner_constants`; takes seconds.

Least squares of the logarithms of predicted over published, on the rows of launcher/planning/published.yaml that are
marked as fitted, with weak priors where a handful of rows cannot tell constants apart. Prints them, and how near the
goals of `broadgauge plan --validate` come with them.
"""

import math
from collections.abc import Sequence

from launcher.planning import validate
from launcher.planning.constants import Constants

PRIORS = {
    "matrix_share": (0.90, 0.10),
    "half_size": (100.0, 100.0),
    "memory_share": (0.75, 0.15),
    "link_share": (0.75, 0.15),
    "network_share": (0.75, 0.15),
    "overlap_share": (0.80, 0.20),
}
"""What is expected before any row is seen, and how far from it a constant may well be."""

_BOUNDS = {
    "matrix_share": (0.7, 1.0),
    "half_size": (0.0, 300.0),
    "memory_share": (0.4, 0.95),
    "link_share": (0.4, 0.95),
    "network_share": (0.4, 0.95),
    "overlap_share": (0.3, 1.0),
}
_ROW_SPREAD = 0.04  # relative error of a row that is expected
_PRIOR_WEIGHT = 0.5


def constants_of(values: Sequence[float]) -> Constants:
    return Constants(**dict(zip(PRIORS, (float(value) for value in values), strict=True)))


def fit() -> Constants:
    from scipy.optimize import least_squares

    fitted = [row for row in validate.rows() if row.is_fitted]

    def residuals(values: Sequence[float]) -> list[float]:
        constants = constants_of(values)
        rows = [math.log(row.predicted(constants) / row.published) / _ROW_SPREAD for row in fitted]
        priors = zip(values, PRIORS.values(), strict=True)
        return rows + [_PRIOR_WEIGHT * (value - expected) / spread for value, (expected, spread) in priors]

    start, spreads = zip(*PRIORS.values(), strict=True)
    low, high = zip(*_BOUNDS.values(), strict=True)
    found = least_squares(residuals, start, bounds=(low, high), x_scale=spreads, diff_step=1e-3)
    return constants_of(found.x)


def main() -> None:
    constants = fit()
    for name in PRIORS:
        print(f"{name:16} {getattr(constants, name):8.3f}")
    comparisons = validate.compare(constants)
    for goal in validate.GOALS:
        print(f"{goal.name:40} {goal.value(comparisons):6.1%}  (goal {goal.limit:.0%})")


if __name__ == "__main__":
    main()
