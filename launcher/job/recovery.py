"""Bringing a run's checkpoints back from where they are uploaded, when this machine has lost or never had them."""

from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.format import store
from trainer.checkpoint.remote.copies import Remote
from trainer.checkpoint.remote.object_store import RemoteFailed
from trainer.config import RunConfig, UserError
from trainer.config_file import differences, from_tree

_ONES_OWN = (
    *("parallel.", "launch.", "supervise.", "monitoring.", "checkpoint.", "evaluation.", "generate."),
    *("data.prepared", "preset", "name"),
)
"""Settings in which one life of a run may differ from another."""


def fetch_newer(config: RunConfig, checkpoints: Path, record: Callable[..., None]) -> None:
    """Fetch the newest checkpoint from `checkpoint.upload_to`, if it is newer than what is here.

    Raises:
        UserError: another run's checkpoints are there; or nobody can say what is there, and nothing is here.
    """
    url = config.checkpoint.upload_to
    if url is None:
        return
    here = _newest_whole(checkpoints)
    try:
        remote = Remote.open(url)
        newer = [step for step in remote.steps() if step > here]
        if not newer:
            return
        _check_same_run(remote, newer[-1], config)
        found = remote.fetch_newest(
            checkpoints, newer_than=here, rejected=lambda why: record("checkpoint_rejected", reason=why)
        )
    except RemoteFailed as error:
        if here < 0:
            raise UserError(
                f"{error}; there may be checkpoints of this run, so it does not start anew; mend that, or empty "
                "checkpoint.upload_to"
            ) from error
        record("checkpoint_rejected", reason=f"{error}; going on from what is here")
        return
    if found is not None:
        record("checkpoint_fetched", step=store.read(found).step, url=remote.url)


def _check_same_run(remote: Remote, step: int, config: RunConfig) -> None:
    theirs = from_tree(remote.read_manifest(step).config | {"preset": None})
    changed = [each for each in differences(theirs, config) if not each.key.startswith(_ONES_OWN)]
    if changed:
        raise UserError(
            f"{remote.url} has checkpoints of a run with another config ({'; '.join(map(str, changed[:4]))}); name "
            "another place in checkpoint.upload_to"
        )


def _newest_whole(checkpoints: Path) -> int:
    """The newest step whose files are all there with their sizes, -1 if there is none; ranks check the hashes."""
    for step in reversed(store.steps(checkpoints)):
        folder = checkpoints / store.folder_name(step)
        try:
            files = store.read(folder).files
            if all((folder / name).stat().st_size == size for name, (size, _) in files.items()):
                return step
        except (UserError, OSError):
            continue
    return -1
