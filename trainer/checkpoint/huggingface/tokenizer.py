"""The tokenizer of a model to import."""

import shutil
from pathlib import Path

import transformers

from trainer.checkpoint.huggingface.export import MORE_TOKENIZER_FILES, TOKENIZER_FILES
from trainer.checkpoint.huggingface.generation import quiet


def save_tokenizer(source: Path, folder: Path) -> str | None:
    """Write the tokenizer of a model's folder as a folder of its own; returns why not, in one line, if it has none.

    Its files stay as they are where they suffice; older ones (vocab.json, tokenizer.model) become a tokenizer.json.
    """
    if all((source / name).is_file() for name in TOKENIZER_FILES):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return None
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # what transformers raises for a folder without one has no class of its own
        shutil.rmtree(folder, ignore_errors=True)
        return f"transformers opens none in {source} ({' '.join(str(error).split())[:200]})"
    if not (folder / TOKENIZER_FILES[0]).is_file():
        shutil.rmtree(folder)
        return f"that of {source} cannot be written as {TOKENIZER_FILES[0]}"
    return None
