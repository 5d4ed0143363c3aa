"""The tokenizer of a model to import."""

import shutil
from pathlib import Path

import transformers

from trainer.checkpoint.huggingface.export import MORE_TOKENIZER_FILES, TOKENIZER_FILES
from trainer.checkpoint.huggingface.generation import quiet
from trainer.config import UserError

_GPT2_FILES = ("vocab.json", "merges.txt")


def save_tokenizer(source: Path, folder: Path) -> bool:
    """Write the tokenizer of a model's folder as a folder of its own; whether there is one in a form known here.

    A tokenizer.json stays as it is with its settings; the vocabulary and merges of GPT-2's time become one.

    Raises:
        UserError: transformers cannot open them.
    """
    if _has(source, TOKENIZER_FILES):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return True
    if not _has(source, _GPT2_FILES):  # without files transformers would make one of nothing
        return False
    try:
        with quiet():
            transformers.AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    except Exception as error:  # what transformers raises has no class of its own
        raise UserError(f"transformers cannot open that of {source}: {' '.join(str(error).split())[:200]}") from error
    return _has(folder, TOKENIZER_FILES)


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in names)
