"""Raw text to a folder that training reads: tokenizer/, NAME/train.bin/.idx and heldout.bin/.idx, manifest.json.

The same text and settings give the same bytes, whatever the number of workers and however often the work was
interrupted. The passes: clean every split (`data_pipeline.cleaning`), decide over the whole corpus
(`data_pipeline.decisions`), apply that and tokenize (`data_pipeline.finishing`), join (`data_pipeline.joining`). Where
nothing can change a text any more once it is clean, the first pass tokenizes and the third falls away.

Finished work lies in `.work` until everything is published under its name, the manifest last: a folder without one is
nobody's data, and preparing it again goes on with the parts that are whole.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.building import WORK_FOLDER, Build
from data_pipeline.filters.classifier import Classifier
from data_pipeline.manifest import MANIFEST_FILE, Manifest, check_enough
from data_pipeline.progress import NoProgress, Progress
from data_pipeline.publishing import TOKENIZER_FOLDER as TOKENIZER_FOLDER
from data_pipeline.settings import SPLIT_SEED, Settings
from data_pipeline.sources import Plan, plan_splits
from data_pipeline.tasks import Workers, without_room
from data_pipeline.tokenization import Tokenizer, check_tokenizer, check_vocab_size
from data_pipeline.workers import LocalWorkers, num_cores
from trainer.data_config import DataConfig
from trainer.section import UserError

_LOCK_FILE = ".prepare.lock"


def prepare(
    data: DataConfig,
    *,
    vocab_size: int,
    seq_length: int,
    out: Path,
    seed: int = SPLIT_SEED,
    min_train_tokens: int = 0,
    workers: Workers | int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make sure that `out` holds the prepared data of these settings; does nothing where it already does.

    The sources are not looked at again once prepared. Files damaged since are made anew, from the same text only.
    `workers` are so many processes on this machine, one a core if it is None, or others' (`launcher.job.ray_workers`).

    Raises:
        UserError: a source, the tokenizer or the vocabulary cannot be used; the text is too small for a batch of
            `min_train_tokens` or for one held-out sequence; `out` holds something else, is in use, or is full.
        PreparationFailed: more splits failed than `data.max_bad_splits`; the rest is kept for the next try.
    """
    settings, out = Settings.of(data, vocab_size, seq_length, seed), out.absolute()  # as other machines see it
    manifest = find_prepared(settings, out)
    if manifest is None or (out / WORK_FOLDER).exists():
        plan = None if manifest else preflight(settings, out)
        with _locked(out):
            manifest = find_prepared(settings, out)  # another process may have been faster
            if manifest is None:
                with _pool(workers) as pool, without_room(out):
                    build = Build(data, settings, plan or preflight(settings, out), out, pool, progress or NoProgress())
                    manifest = build.run(min_train_tokens)
            shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
    check_enough(manifest.portions, seq_length, min_train_tokens)
    return manifest


def find_prepared(settings: Settings, out: Path) -> Manifest | None:
    """The manifest of `out` if it holds these settings' data, whole.

    Raises:
        UserError: it holds the data of other settings.
    """
    if not (out / MANIFEST_FILE).exists():
        return None
    manifest = Manifest.load(out)
    differences = manifest.settings.differences(settings)
    if differences:
        raise UserError(f"{out} holds data prepared with other settings ({'; '.join(differences)}); use another folder")
    given = settings.data.tokenizer.path
    if given is not None and Path(given).expanduser().exists():  # it may have gone since
        check_same_tokenizer(Path(given).expanduser(), manifest, out)
    return None if manifest.damage(out) else manifest


def check_same_tokenizer(tokenizer: Path, manifest: Manifest, out: Path) -> None:
    """Refuse a tokenizer under which the tokens of prepared data mean something else.

    Raises:
        UserError: it is not the one that the data was prepared with.
    """
    fingerprint = Tokenizer.load(tokenizer, "reference").fingerprint
    if fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"data.tokenizer: {tokenizer} (hash {fingerprint}) is not the tokenizer that {out} was prepared with (hash "
            f"{manifest.tokenizer_fingerprint}); name that one, leave it out, or prepare the data again elsewhere"
        )


def preflight(settings: Settings, out: Path) -> Plan:
    """Refuse, before anything is written, what can be seen to fail; returns what there is to read.

    Raises:
        UserError: see `prepare`.
    """
    if out.exists():
        if not out.is_dir():
            raise UserError(f"{out} is not a folder; name another one to write prepared data to")
        names = {path.name for path in out.iterdir()}
        if names and not names & {_LOCK_FILE, MANIFEST_FILE}:
            raise UserError(f"{out} holds files that are no prepared data ({min(names)}, ...); use another folder")
    if settings.data.tokenizer.path is None:
        check_vocab_size(settings.vocab_size, settings.data.tokenizer)
    else:
        check_tokenizer(Path(settings.data.tokenizer.path).expanduser(), settings.vocab_size)
    if settings.data.quality.classifier is not None:
        Classifier.load(Path(settings.data.quality.classifier).expanduser())
    return plan_splits(settings.data)


@contextmanager
def _pool(workers: Workers | int | None) -> Iterator[Workers]:
    with ExitStack() as resources:
        if workers is None or isinstance(workers, int):
            workers = resources.enter_context(LocalWorkers(workers or num_cores()))
        yield workers


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folder and hold it for this process; the kernel lets go when the process ends, however it ends.

    The lock's file stays: it marks a folder that an interrupted preparation may go on in.

    Raises:
        UserError: the folder cannot be written, or another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / _LOCK_FILE, "a", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); use another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out} is being prepared by another process; wait for it or stop it") from error
        yield
