"""Where a model to import lies: a local folder, or the Hugging Face hub by name."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trainer.config import UserError

_WANTED = ["*.json", "*.safetensors", "*.txt", "tokenizer.model", "*.jinja"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder of a model; one of the hub is downloaded to its cache, or found there.

    Args:
        source: a folder, or a name like openai-community/gpt2.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there is no such model, or no way to it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{source} is a folder, which has no revisions; leave --revision out")
        return folder
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"{source} is neither a folder nor the name of a model like openai-community/gpt2")
    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=_WANTED))
    except GatedRepoError as error:
        raise UserError(f"{source} is gated on the hub; accept its terms there and log in (hf auth login)") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{source} has no revision {revision} on the hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{source} is neither a folder here nor a model of the hub that you can see") from error
    except HFValidationError as error:
        raise UserError(f"{source} is neither a folder nor the name of a model: {_one_line(error)}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{source} is no folder here, not in the hub's cache, and the hub cannot be reached; fetch it where there "
            "is a network (hf download), and name its folder"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
