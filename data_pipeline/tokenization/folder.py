"""A tokenizer's folder, which `transformers.AutoTokenizer` opens with no code of ours."""

import functools
from collections.abc import Sequence
from pathlib import Path

import orjson
import tokenizers

from data_pipeline.durable import sync_folder, write_synced
from data_pipeline.tokenization.adversarial import ADVERSARIAL_TEXTS
from data_pipeline.tokenization.sentencepiece_conversion import (
    ConversionError,
    convert_sentencepiece,
    verify_conversion,
)
from trainer.section import UserError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
END_OF_TEXT = "<|endoftext|>"
_ENDS_OF_TEXT = (END_OF_TEXT, "</s>")  # GPT-2's and SentencePiece's; the first that a tokenizer has ends documents


def read_tokenizer(folder: Path) -> tuple[bytes, tokenizers.Tokenizer]:
    """Content of the folder's tokenizer.json, or what its tokenizer.model is as one, and the tokenizer.

    Raises:
        UserError: there is neither, or not one with an end-of-text token.
    """
    path = folder / TOKENIZER_FILE
    if not path.exists() and (folder / SENTENCEPIECE_FILE).exists():
        path = folder / SENTENCEPIECE_FILE
    try:
        content, backend = _parsed(path.name, path.read_bytes())
    except OSError as error:
        raise UserError(
            f"data.tokenizer: {path} cannot be read ({error.strerror}); name a folder that holds {TOKENIZER_FILE} or "
            f"{SENTENCEPIECE_FILE}"
        ) from error
    except ConversionError as error:
        raise UserError(
            f"data.tokenizer: {path} cannot be used: {error}; name a folder with a {TOKENIZER_FILE}"
        ) from error
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise UserError(
            f"data.tokenizer: {path} is not a tokenizer ({error}); save it again with transformers"
        ) from error
    if not any(backend.token_to_id(token) is not None for token in _ENDS_OF_TEXT):
        raise UserError(
            f"data.tokenizer: {path} has no {' or '.join(_ENDS_OF_TEXT)} token, which ends every document; "
            f"add it to the tokenizer, or leave data.tokenizer empty to train one"
        )
    return content, backend


@functools.lru_cache(maxsize=1)
def _parsed(name: str, stored: bytes) -> tuple[bytes, tokenizers.Tokenizer]:
    """Kept: the stages of a preparation open the same tokenizer again and again, at a tenth of a second each time."""
    content = sentencepiece_as_json(stored) if name == SENTENCEPIECE_FILE else stored
    return content, tokenizers.Tokenizer.from_buffer(content)


def end_of_text_of(backend: tokenizers.Tokenizer) -> str:
    return next(token for token in _ENDS_OF_TEXT if backend.token_to_id(token) is not None)


def sentencepiece_as_json(content: bytes, texts: Sequence[str] = ()) -> bytes:
    """tokenizer.json of a tokenizer.model, compared with `sentencepiece` itself on these and on difficult texts.

    Raises:
        ConversionError: there is no exact counterpart.
    """
    backend = convert_sentencepiece(content)
    verify_conversion(content, backend, [*ADVERSARIAL_TEXTS, *texts])
    return backend.to_str(pretty=True).encode()


def write_folder(folder: Path, tokenizer_json: bytes, seq_length: int, sentencepiece: bytes | None = None) -> None:
    """tokenizer.json and what transformers needs to know beside it (it neither writes nor needs other files).

    Args:
        seq_length: tokens that the model reads at most.
        sentencepiece: the tokenizer.model that it was made of, for tools that read no tokenizer.json.
    """
    backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    end_of_text = end_of_text_of(backend)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if backend.token_to_id("<s>") is not None and end_of_text == "</s>" else end_of_text,
        "eos_token": end_of_text,
        "unk_token": "<unk>" if backend.token_to_id("<unk>") is not None and end_of_text == "</s>" else end_of_text,
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_synced(folder / TOKENIZER_FILE, tokenizer_json)
    if sentencepiece is not None:
        write_synced(folder / SENTENCEPIECE_FILE, sentencepiece)
    write_synced(folder / CONFIG_FILE, orjson.dumps(config, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
    sync_folder(folder)
