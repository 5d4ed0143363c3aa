"""What can be seen to fail before anything is written or started: refused here, in one line each."""

from pathlib import Path

from data_pipeline.manifest import MANIFEST_FILE, Manifest, check_enough
from data_pipeline.pipeline import TOKENIZER_FOLDER, check_same_tokenizer, find_prepared, preflight
from data_pipeline.settings import Settings
from data_pipeline.tokenization import Tokenizer
from launcher.evaluation.finding import check_tasks
from launcher.fitting import OnShortage, check_memory, refuse
from launcher.job.ranks import check_embedded, this_machine
from trainer.checkpoint.format import compatibility, store
from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.remote.copies import Remote
from trainer.config import RunConfig, UserError
from trainer.data.blend import DatasetUse, epochs
from trainer.data.prepared import fingerprints
from trainer.progress import Advance, unheard
from trainer.run_dir import RunDir


def check_run(
    config: RunConfig,
    run_dir: RunDir,
    *,
    on_cluster: bool = False,
    advance: Advance = unheard,
    on_shortage: OnShortage = refuse,
) -> None:
    """Everything that a whole run needs.

    Args:
        advance: hears of prepared data that is read, in bytes.
        on_shortage: hears why the run does not fit this machine, if it does not.

    Raises:
        UserError: says what and how to mend it.
    """
    from trainer.checkpoint.huggingface import export

    export.check_exportable(config)
    check_start(config, run_dir, on_cluster=on_cluster, on_shortage=on_shortage)
    if config.data.prepared:
        check_prepared(config, run_dir, advance)
    else:
        check_sources(config, run_dir)
    check_start_from(config, run_dir)
    if (run_dir.data_for(config) / MANIFEST_FILE).exists():
        check_prompt(config, run_dir)


def check_train(
    config: RunConfig,
    run_dir: RunDir,
    *,
    on_cluster: bool = False,
    advance: Advance = unheard,
    on_shortage: OnShortage = refuse,
) -> None:
    """What training alone needs; arguments as of `check_run`.

    Raises:
        UserError: says what and how to mend it.
    """
    check_start(config, run_dir, on_cluster=on_cluster, on_shortage=on_shortage)
    check_prepared(config, run_dir, advance)
    check_start_from(config, run_dir)


def check_start(
    config: RunConfig, run_dir: RunDir, *, on_cluster: bool = False, on_shortage: OnShortage = refuse
) -> None:
    """Raises:
    UserError: this machine cannot hold the layout, the folder belongs to another run, a task is wrong, or checkpoints
        cannot be uploaded to where they should be.
    """
    if not on_cluster:  # `launcher.verbs.stages.claim` asks the cluster
        check_embedded(config)
        check_memory(config, [this_machine(config)], on_shortage)
    run_dir.check(config)
    check_tasks(config.evaluation.tasks, config.checkpoint.best_by)
    if config.checkpoint.upload_to:
        Remote.open(config.checkpoint.upload_to).check()


def settings_of(config: RunConfig) -> Settings:
    return Settings.of(config.data, config.model.vocab_size, config.model.seq_length)


def check_sources(config: RunConfig, run_dir: RunDir) -> None:
    """Raises:
    UserError: the sources or the data folder cannot be used, and the data is not there already.
    """
    if find_prepared(settings_of(config), run_dir.data) is None:
        preflight(settings_of(config), run_dir.data)


def check_prepared(config: RunConfig, run_dir: RunDir, advance: Advance = unheard) -> Manifest:
    """The manifest of the data that the run trains on.

    Raises:
        UserError: there is none, its files are damaged, its tokenizer does not fit the model, or it is too small.
    """
    folder = run_dir.data_for(config)
    manifest = Manifest.load(folder)
    manifest.verify(folder, advance)
    if manifest.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{folder} was tokenized with {manifest.vocab_size} tokens and model.vocab_size is "
            f"{config.model.vocab_size}; set it to {manifest.vocab_size}, or prepare the data again"
        )
    if config.data.tokenizer.path is not None:
        check_same_tokenizer(Path(config.data.tokenizer.path).expanduser(), manifest, folder)
    check_enough(manifest.portions, config.model.seq_length, config.tokens_per_step + 1)
    planned_epochs(config, manifest)
    return manifest


def planned_epochs(config: RunConfig, manifest: Manifest) -> list[DatasetUse]:
    """How much of each data set the run will draw.

    Raises:
        UserError: the blend does not fit the data.
    """
    tokens = {name: portions["train"].tokens for name, portions in manifest.datasets.items()}
    return epochs(config, tokens, manifest.blend)


def check_start_from(config: RunConfig, run_dir: RunDir) -> None:
    """Raises:
    UserError: `checkpoint.resume_from` or `weights_from` is needed, and this run cannot start from it.
    """
    wanted = config.checkpoint.resume_from or config.checkpoint.weights_from
    if not wanted or store.steps(run_dir.checkpoints):
        return
    checkpoint = store.find(Path(wanted))
    data = fingerprints(config, run_dir.data_for(config))
    compatibility.check_start(read_manifest(checkpoint), config, data, checkpoint)


def check_prompt(config: RunConfig, run_dir: RunDir) -> None:
    """Raises:
    UserError: the run's prompt leaves no room in the context, which would only be seen after training.
    """
    tokenizer = Tokenizer.load(run_dir.data_for(config) / TOKENIZER_FOLDER, engine="reference")
    length = len(tokenizer.encode_batch([config.generate.prompt]).ids)
    if length + 1 > config.model.seq_length:
        raise UserError(
            f"generate.prompt has {length} tokens, and with 1 new token it must fit model.seq_length "
            f"{config.model.seq_length}; shorten it"
        )
