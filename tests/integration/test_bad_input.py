"""What a user can get wrong is refused in one line, with exit code 2, before any process starts or file appears."""

from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.verbs import checks
from small_run import NUM_STEPS, broadgauge, write_config
from trainer.checkpoint.format import store
from trainer.config_file import load
from trainer.events import EventLog
from trainer.run_dir import RunDir


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command in this process; returns its one line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert end.value.code == 2, captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


SETTINGS = {
    "unknown key": (["train.total_token=1"], ["train.total_token;", "did you mean train.total_tokens?"]),
    "wrong type": (["model.num_layers=two"], ["model.num_layers", "integer", "'two'"]),
    "ranks": (["launch.ranks_per_node=3"], ["tensor 2 x pipeline 2 x context 1 x data 1 = 4", "ranks_per_node 3 = 3"]),
    "heads": (["model.num_heads=1"], ["model.num_heads 1", "parallel.tensor 2", "use 1"]),
    "layers": (["model.num_layers=3"], ["num_layers 3", "pipeline 2", "use 2 or 4"]),
    "vocabulary": (
        ["parallel.tensor=3", "model.num_heads=3", "model.hidden_size=66", "model.vocab_size=256"],
        ["vocabulary 256", "tensor 3"],
    ),
    "batch": (["train.global_batch_size=18"], ["global_batch_size 18", "micro_batch_size 4", "use 16 or 20"]),
    "missing corpus": (["data.sources=nowhere.jsonl"], ["nowhere.jsonl"]),
    "small corpus": (["train.global_batch_size=4000"], ["tokens", "one batch"]),
    "prompt": ([f"generate.prompt={'the model ' * 40}"], ["generate.prompt has", "seq_length 32", "shorten it"]),
    "resume_from": (["checkpoint.resume_from=nowhere"], ["nowhere is no checkpoint"]),
    "prepared": (["data.prepared=nowhere"], ["nowhere holds no prepared data"]),
    "nodes": (["launch.nodes=2"], ["launch.nodes"]),
    "cluster": (["launch.cluster=h10"], ["no cluster h10 comes along", "did you mean h100?"]),
    "cluster file": (["launch.cluster=nowhere.yaml"], ["cannot read the cluster nowhere.yaml"]),
    "memory": (
        ["model.hidden_size=16384", "model.num_layers=96", "model.num_heads=128"],
        ["4 rank(s) take", "optimizer ", "(snapshots", "GiB; try train.recompute=selective", "--search", "--force"],
    ),
    "task": (["evaluation.tasks=copyin"], ["there is no task 'copyin'", "did you mean copying?"]),
    "score": (
        ["evaluation.tasks=copying", "checkpoint.best_by=copying/0-shot/f2"],
        ["checkpoint.best_by copying/0-shot/f2 is no score of evaluation.tasks", "did you mean copying/"],
    ),
    "task file": (["evaluation.tasks=nowhere.yaml"], ["cannot read the task", "nowhere.yaml"]),
    "service": (
        ["evaluation.where=service", "evaluation.tensor=3"],
        ["the evaluation service cannot hold the model", "its settings are evaluation.tensor"],
    ),
}
BEFORE_ANYTHING_IS_WRITTEN = set(SETTINGS) - {"small corpus", "prompt"}  # these need the text to be tokenized first


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, fragments = SETTINGS[case]
    line = refused(capsys, "run", config_file, "--run-dir", tmp_path / "run", "--set", *settings)
    for fragment in fragments:
        assert fragment in line
    if case in BEFORE_ANYTHING_IS_WRITTEN:
        assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "content", ["", "\n\n", "not json\n", '{"other": "field"}\n', b"\xff\xfe\x00".decode("latin-1")]
)
def test_corpus_without_usable_text(
    content: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(content, encoding="latin-1")
    line = refused(capsys, "run", config_file, "--run-dir", tmp_path / "run", "--set", f"data.sources={corpus}")
    assert str(corpus) in line or "text" in line
    assert not list((tmp_path / "run").glob("data/*.bin"))


def test_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(capsys, "run", tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "not valid YAML" in refused(capsys, "run", tmp_path / "broken.yaml")


def test_run_folder_of_another_config(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(load(config_file))
    EventLog(run_dir.events_path).write("training_started", step=0, checkpoint=None)
    line = refused(capsys, "run", config_file, "--run-dir", run_dir.path, "--set", "optimizer.lr=0.5")
    assert "optimizer.lr: 0.004 -> 0.5" in line and "another --run-dir" in line
    assert load(run_dir.config_path) == load(config_file)


def test_a_refused_run_can_be_mended_in_the_same_folder(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before training starts, nothing ties the folder to a config."""
    long_prompt = f"generate.prompt={'the model ' * 40}"
    assert "shorten it" in refused(capsys, "run", config_file, "--run-dir", tmp_path / "run", "--set", long_prompt)
    mended = load(config_file)
    checks.check_run(mended, RunDir(tmp_path / "run"))
    RunDir(tmp_path / "run").create(mended)
    assert load(tmp_path / "run" / "config.yaml") == mended


def test_folder_that_is_no_run(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds no config.yaml" in refused(capsys, "run", config_file, "--run-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_is_forced_is_warned_of_its_memory_and_goes_on(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as to the next thing that is wrong."""
    large = ("model.hidden_size=16384", "model.num_layers=96", "model.num_heads=128")
    settings = (*large, "data.prepared=nowhere")
    for verb in ("run", "train"):
        with pytest.raises(SystemExit) as end:
            main([verb, str(config_file), "--run-dir", str(tmp_path / "run"), "--force", "--set", *settings])
        said = capsys.readouterr()
        assert end.value.code == 2 and "nowhere holds no prepared data" in said.err
        assert "warning: 4 rank(s) take" in said.out
    assert not (tmp_path / "run").exists()


CHECKPOINTS = {
    "architecture": (["model.hidden_size=32"], 5, 80, "model.hidden_size is 32 in the checkpoint and 64 in the config"),
    "batch": (["train.global_batch_size=8"], 5, 40, "train.global_batch_size 16"),
    "nothing left": ([], NUM_STEPS, 16 * NUM_STEPS, f"step {NUM_STEPS} and the run ends at step {NUM_STEPS}"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint_that_the_run_cannot_go_on_from(
    case: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, step, consumed_samples, fragment = CHECKPOINTS[case]
    folder = store.begin(tmp_path, step)
    other = load(config_file, settings).model_dump(mode="json")
    checkpoint = store.commit(folder, store.Manifest(step, consumed_samples, other))
    resume = f"checkpoint.resume_from={checkpoint}"
    line = refused(capsys, "run", config_file, "--run-dir", tmp_path / "run", "--set", resume)
    assert fragment in line
    assert not (tmp_path / "run").exists()


def test_verbs_refuse_paths_that_hold_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no checkpoint" in refused(capsys, "eval", tmp_path)
    assert "has no results of evaluations" in refused(capsys, "results", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "does not say how many tokens the model knows" in refused(capsys, "eval", tmp_path)
    (tmp_path / "config.json").unlink()
    assert "is no checkpoint" in refused(capsys, "export", tmp_path, "--out", tmp_path / "hf")
    assert "no Hugging Face folder" in refused(capsys, "generate", tmp_path, "--prompt", "the")
    generate = ("generate", tmp_path, "--prompt", "the")
    assert "contradict each other" in refused(capsys, *generate, "--greedy", "--temperature", "0.5")
    assert "--beams 2 draws nothing" in refused(capsys, *generate, "--beams", "2", "--temperature", "0.5")
    assert "--temperature inf is no number" in refused(capsys, *generate, "--temperature", "inf")
    assert "--length-penalty nan is no number" in refused(capsys, *generate, "--length-penalty", "nan")
    assert not (tmp_path / "hf").exists()


def test_debug_shows_the_traceback(config_file: Path) -> None:
    quiet = broadgauge("run", config_file, "--set", "model.num_layers=0")
    loud = broadgauge("--debug", "run", config_file, "--set", "model.num_layers=0")
    assert quiet.returncode == 2 and "Traceback" not in quiet.stderr
    assert loud.returncode == 2 and "Traceback" in loud.stderr and "UserError" in loud.stderr
