"""The page of a run in a real browser: what it shows, how it looks, and what it does not let happen."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import made_record
from browser import Browser, Page, chromium
from launcher.monitor.monitor import Monitor
from launcher.verbs import reporting
from trainer import config_file
from trainer.run_dir import RunDir

PLOTS = ["Loss", "Gradient norm", "Throughput", "Model FLOPs utilisation", "Step time", "Phases of a step", "Tasks"]
HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Page:
    return browser.page()


@contextmanager
def served(run_dir: RunDir, **monitoring: Any) -> Iterator[Monitor]:
    config = config_file.load(run_dir.config_path)
    changed = config.monitoring.model_copy(update=monitoring)
    monitor = Monitor(config.model_copy(update={"monitoring": changed}), run_dir, lambda *_, **__: None)
    try:
        yield monitor
    finally:
        monitor.close()


def open_at(page: Page, monitor: Monitor, step: int) -> None:
    assert monitor.url is not None
    page.open(monitor.url)
    page.until(f"document.body.dataset.step === '{step}'")


def plot_of(title: str) -> str:
    """As an expression."""
    return f"document.querySelector('svg[aria-label=\"{title}\"]')"


def points(page: Page, plot: str, curve: str) -> int:
    """That are drawn of a curve."""
    found = page.evaluate(f"{plot_of(plot)}.querySelector('path[data-name=\"{curve}\"]').getAttribute('d')")
    return len(re.findall("[ML]", found))


def choose(page: Page, select: str, value: str) -> None:
    change = "select.dispatchEvent(new Event('change'))"
    page.evaluate(f"(select => {{ select.value = '{value}'; {change} }})(document.querySelector('{select}'))")


def text_of(page: Page, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({selector!r}).innerText"))


def test_everything_is_shown_and_nobody_complains(page: Page, tmp_path: Path) -> None:
    run_dir = made_record.run_of(tmp_path / "run", 300, planned=600)
    with served(run_dir) as monitor:
        open_at(page, monitor, 300)
        assert points(page, "Loss", "training") == points(page, "Gradient norm", "grad norm") == 300
        assert points(page, "Loss", "held-out") == 4
        assert points(page, "Tasks", "arithmetic/8-shot/accuracy") == 3
        visible = page.evaluate("[...document.querySelectorAll('#plots svg')].map(s => s.getAttribute('aria-label'))")
        assert set(PLOTS) < set(visible)
        for plot in visible:  # the failure and the start after it
            assert page.evaluate(f"{plot_of(plot)}.querySelectorAll('line.mark').length") == 2, plot
        told = page.evaluate(f"{plot_of('Loss')}.querySelector('.reach title').textContent")
        assert "life_failed" in told and "rank 3 was killed by SIGKILL" in told
        assert text_of(page, "#state") == "training"
        assert "step 300 of 600 (50.0 %)" in text_of(page, "#progress-text")
        assert "left" in text_of(page, "#progress-text")
        figures = text_of(page, "#figures")
        assert f"{made_record.loss_at(300):.4g}"[:5] in figures and "MFU" in figures
        assert re.search(r"restarts\s+1\b", figures)
        assert re.search(r"productive \d+ min", text_of(page, "#time-legend"))
        assert "rank 5 at step 300" in text_of(page, "#heat-text") and "1.7" in text_of(page, "#heat-text")
        for table, rows in (("checkpoints", 6), ("evaluations", 6), ("tasks", 2), ("data", 2), ("events", 3)):
            assert page.evaluate(f"document.getElementById('{table}').tBodies[0].rows.length") == rows, table
        assert "rank-2 | step 99 of rank 2" in text_of(page, "#log")
        page.evaluate(
            "(s => { s.value = 'rank-1'; s.dispatchEvent(new Event('change')) })(document.querySelector('#log-of'))"
        )
        assert text_of(page, "#log").splitlines()[-1] == "step 99 of rank 1"
        assert page.problems == []
        assert all(request.startswith((monitor.url or "", "data:")) for request in page.requests)


def test_a_cursor_tells_values_to_pointer_and_keyboard(page: Page, tmp_path: Path) -> None:
    run_dir = made_record.run_of(tmp_path / "run", 100)
    with served(run_dir) as monitor:
        open_at(page, monitor, 100)
        plot = plot_of("Loss")
        page.evaluate(f"{plot}.focus()")
        for _ in range(3):
            page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
        readout = page.evaluate(f"{plot}.previousSibling.textContent")
        assert readout.startswith("step 97: training ")
        page.evaluate(
            "(s => { s.value = 'time'; s.dispatchEvent(new Event('change')) })(document.querySelector('#axis'))"
        )
        assert "min" in page.evaluate(f"[...{plot}.querySelectorAll('text')].map(t => t.textContent).join(' ')")
        page.evaluate("document.querySelector('#logarithmic').click()")
        assert points(page, "Loss", "training") == 100 and page.problems == []


def test_it_goes_on_with_the_run(page: Page, tmp_path: Path) -> None:
    run_dir = made_record.run_of(tmp_path / "run", 100, planned=200)
    with served(run_dir) as monitor:
        open_at(page, monitor, 100)
        page.evaluate("window.mine = 1")  # lost if it were loaded again
        made_record.append(run_dir, list(made_record.steps(101, 130)))
        page.until("document.body.dataset.step === '130'")
        assert points(page, "Loss", "training") == 130
        made_record.append(run_dir, [{"time": made_record.at(131), "kind": "hung", "verdict": "rank 7 is stopped"}])
        page.until("document.querySelector('#events').innerText.includes('rank 7 is stopped')")
        assert text_of(page, "#state") == "recovering"
        made_record.append(run_dir, [made_record.started(120, made_record.at(135))])
        page.until("document.body.dataset.step === '120'")
        assert points(page, "Loss", "training") == 120
        assert page.evaluate("window.mine") == 1 and page.problems == []


def test_when_nobody_answers_it_says_so_and_keeps_the_picture(page: Page, tmp_path: Path) -> None:
    run_dir = made_record.run_of(tmp_path / "run", 100)
    with served(run_dir) as monitor:
        open_at(page, monitor, 100)
        port = int((monitor.url or "").rstrip("/").rpartition(":")[2])
    page.until("document.querySelector('#connection').textContent.startsWith('Nobody has answered since')")
    assert points(page, "Loss", "training") == 100
    made_record.append(run_dir, list(made_record.steps(101, 110)))
    with served(run_dir, page_port=port):
        page.until("document.body.dataset.step === '110'")
        assert text_of(page, "#connection") == ""


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_on_a_phone_and_in_the_dark(page: Page, tmp_path: Path, dark: bool) -> None:
    run_dir = made_record.run_of(tmp_path / "run", 300)
    page.look(360, 780, dark=dark)
    with served(run_dir) as monitor:
        open_at(page, monitor, 300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        sizes = "[...document.querySelectorAll('body *')].filter(e => e.childNodes.length && e.offsetParent)"
        assert page.evaluate(f"Math.min(...{sizes}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12
        for selector, behind in (("h1", "body"), ("#facts", "body"), ("#figures dt", "section"), ("#state", "body")):
            ink = page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).color")
            paper = page.evaluate(f"getComputedStyle(document.querySelector({behind!r})).backgroundColor")
            assert contrast(ink, paper) >= 4.5, (selector, ink, paper)
        assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == dark


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def poisoned(folder: Path) -> RunDir:
    """A run whose record and logs hold what a browser would act on."""
    run_dir = made_record.run_of(folder, 60)
    source = {"share": 1.0, "epochs": 1.0, "documents": 1, "tokens": 1, "dropped": {HOSTILE: 3}}
    late = made_record.at(61)
    made_record.append(
        run_dir,
        [
            {"time": late, "kind": "blend", "datasets": {HOSTILE: source}},
            {"time": late, "kind": "hung", "verdict": HOSTILE, "suspects": [], "stacks": ""},
            {"time": late, "kind": "life_failed", "what": HOSTILE, "error": HOSTILE, "machine": "", "step": 60},
            {**made_record.started(60, late), "device": HOSTILE},
        ],
    )
    (run_dir.logs / "rank-0.log").write_text(f"{HOSTILE}\n")
    (run_dir.logs / "<img src=x onerror=window.owned=1>.log").write_text("a line\n")
    return run_dir


def test_nothing_that_a_run_says_is_obeyed(page: Page, tmp_path: Path) -> None:
    run_dir = poisoned(tmp_path / "run")
    with served(run_dir) as monitor:
        open_at(page, monitor, 60)
        expect_harmless(page)


def test_nothing_that_a_run_says_is_obeyed_in_its_report(page: Page, tmp_path: Path) -> None:
    path = reporting.write(poisoned(tmp_path / "run").path, None, ())
    page.open(path.as_uri())
    expect_harmless(page)
    assert page.requests == [path.as_uri()]


def expect_harmless(page: Page) -> None:
    for selector in ("#events", "#data", "#log", "#facts"):
        assert HOSTILE in text_of(page, selector).replace("\xa0", " "), selector
    assert page.evaluate("window.owned") is None
    assert page.evaluate("document.querySelectorAll('img, script:not([src]):not([type])').length") in (0, 3)
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.problems == []


def test_a_long_run_is_there_at_once(page: Page, tmp_path: Path) -> None:
    """100,000 steps: two seconds from asking to a picture that answers, and curves that still show every outlier."""
    run_dir = made_record.run_of(tmp_path / "run", 100_000)
    made_record.append(run_dir, [made_record.step_event(100_001, loss=99.0), made_record.step_event(100_002)])
    with served(run_dir) as monitor:
        assert monitor._watched is not None
        monitor._watched.metrics("")  # as it has read what came, all along
        open_at(page, monitor, 100_002)
        drawn = page.evaluate(
            "new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()), 0)))"
        )
        assert drawn < 2000
        assert 500 < points(page, "Loss", "training") <= 1002
        assert page.evaluate("PLOTS.loss.shown.curves[0].y.includes(99)")
    report = reporting.write(run_dir.path, None, ())
    assert report.stat().st_size < 3e6


def test_a_token_opens_the_page_and_is_not_left_in_the_address(page: Page, browser: Browser, tmp_path: Path) -> None:
    run_dir = made_record.run_of(tmp_path / "run", 100)
    with served(run_dir, listen="network") as monitor:
        open_at(page, monitor, 100)
        assert page.evaluate("location.hash") == ""
        page.evaluate("window.mine = 1; location.reload()")
        page.until("window.mine === undefined && document.body?.dataset.step === '100'")
        stranger = browser.page()
        stranger.open((monitor.url or "").partition("#")[0])
        stranger.until("document.querySelector('#connection').textContent.startsWith('A token is needed')")
        assert stranger.evaluate("document.body.dataset.step") is None


def test_a_report_needs_no_server_and_compares_runs(page: Page, tmp_path: Path) -> None:
    first = made_record.run_of(tmp_path / "first", 300, name="lion")
    of_plan = {"step_seconds": 0.5, "tokens_per_second": 64e3, "mfu": 0.25, "memory_bytes": 3e9}
    made_record.append(first, [{"time": 2000.0, "kind": "planned", "nodes": 1, "layout": "", "device": "X", **of_plan}])
    second = made_record.run_of(tmp_path / "second", 200, name="tiger")
    path = reporting.write(first.path, tmp_path / "out.html", [second.path])
    page.open(path.as_uri())
    assert points(page, "Loss", "lion, training") == 300 and points(page, "Loss", "tiger, training") == 200
    assert points(page, "Throughput", "tiger") == 200
    paths = f"[...{plot_of('Throughput')}.querySelectorAll('path')]"
    dashes = page.evaluate(f"{paths}.map(path => path.getAttribute('stroke-dasharray'))")
    assert len(set(dashes)) == 2  # told apart without colours
    compared = text_of(page, "#compared")
    assert "lion" in compared and "tiger" in compared and "300 of 300" in compared and "200 of 200" in compared
    assert text_of(page, "#state") == "cut off"
    (planned,) = (text.split() for text in text_of(page, "#plan tbody").splitlines() if text.startswith("step time"))
    assert planned[2:] == ["0.5", "s", "\N{EN DASH}", "\N{EN DASH}"]
    assert page.problems == [] and page.requests == [path.as_uri()]
