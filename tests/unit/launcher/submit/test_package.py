"""What goes to a cluster: code that runs, the config, and no path that means nothing there."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.submit.package import CONFIG_NAME, check_paths, write_package
from trainer import config_file
from trainer.config import UserError
from trainer.config_file import from_tree

RUN_DIR = Path("/shared/run")


def test_the_package_is_code_and_config_and_runs_apart_from_the_checkout(tmp_path: Path) -> None:
    config = from_tree({"name": "sent", "seed": 7})
    write_package(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"trainer", "launcher", "data_pipeline", CONFIG_NAME}
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".py", ".yaml", ".jsonl", ".html", ".css", ".js"}  # tasks with their records, the page's three
    assert config_file.load(tmp_path / CONFIG_NAME) == config
    program = "import launcher; from launcher.cli.main import main; print(launcher.__file__); main()"
    shown = subprocess.run(
        [sys.executable, "-c", program, "config", "show", CONFIG_NAME],
        cwd=tmp_path,
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown == f"{tmp_path}/launcher/__init__.py\n{config_file.dump(config)}"


@pytest.mark.parametrize(
    ("key", "tree"),
    [
        ("data.sources corpus/*.jsonl", {"data": {"sources": ["s3://bucket/x", "corpus/*.jsonl"]}}),
        ("data.datasets.web.sources web", {"data": {"datasets": {"web": {"sources": ["web"]}}}}),
        ("data.prepared data/text", {"data": {"prepared": "data/text"}}),
        ("data.tokenizer.path tokens", {"data": {"tokenizer": "tokens"}}),
        ("data.quality.classifier q.npz", {"data": {"quality": {"classifier": "q.npz"}}}),
        ("data.decontaminate.against ./e.txt", {"data": {"decontaminate": {"against": ["./e.txt"]}}}),
        ("data.tokenizer.path ~/tokens", {"data": {"tokenizer": "~/tokens"}}),
        ("checkpoint.snapshots_in fast", {"checkpoint": {"snapshots_in": "fast"}}),
        ("checkpoint.upload_to copies", {"checkpoint": {"upload_to": "copies"}}),
        ("checkpoint.resume_from a/b", {"checkpoint": {"resume_from": "a/b"}}),
        ("checkpoint.weights_from a/b", {"checkpoint": {"weights_from": "a/b"}}),
    ],
)
def test_relative_paths_are_refused_by_key(key: str, tree: dict[str, object]) -> None:
    with pytest.raises(UserError) as refusal:
        check_paths(from_tree(tree), RUN_DIR)
    assert str(refusal.value).startswith(f"{key} is no whole path, and the machines of a cluster stand in another")


def test_whole_paths_urls_and_what_is_no_path_are_taken() -> None:
    sources = ["/corpus/*.jsonl", "hf:allenai/c4", "https://host/x.txt", "python-stdlib"]
    check_paths(from_tree({"data": {"sources": sources}, "checkpoint": {"upload_to": "s3://bucket/run"}}), RUN_DIR)
    with pytest.raises(UserError, match=r"^--run-dir runs/small is no whole path"):
        check_paths(from_tree({}), Path("runs/small"))
