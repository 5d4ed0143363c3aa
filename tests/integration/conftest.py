"""What the drills share: one small job, one Ray, and runs that nobody disturbed, each trained once."""

from collections.abc import Callable, Iterator

import pytest

import drill
from drilled_run import NUM_STEPS, DrilledRun, SmallJob, expect_as_if_undisturbed

Undisturbed = Callable[..., DrilledRun]


@pytest.fixture(scope="session")
def small_job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    return SmallJob(tmp_path_factory.mktemp("job"))


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Drills come last: their Ray is started once, and other tests have processes without one."""
    items.sort(key=lambda item: "one_ray" in item.fixturenames)


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    with drill.one_ray():
        yield


@pytest.fixture(scope="session")
def undisturbed_runs() -> dict[tuple[int, str], DrilledRun]:
    return {}


@pytest.fixture
def undisturbed(
    small_job: SmallJob,
    one_ray: None,
    undisturbed_runs: dict[tuple[int, str], DrilledRun],
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    def run(num_steps: int = NUM_STEPS, layout: str = "TP2 x PP2") -> DrilledRun:
        if (num_steps, layout) not in undisturbed_runs:
            new = small_job.new_run(tmp_path_factory.mktemp("undisturbed"), num_steps, layout)
            drill.train_to_the_end(new)
            expect_as_if_undisturbed(new, new)
            undisturbed_runs[num_steps, layout] = new
        return undisturbed_runs[num_steps, layout]

    return run
