"""Other ways from jsonl to a Megatron .bin/.idx, each as people write it: `python -m benchmarks.data.peers NAME ...`.

Every one is a command of its own, so that imports and start-up count as they do for ours.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
NUM_CORES = len(os.sched_getaffinity(0))


def datasets_map(sources: list[Path], tokenizer_folder: Path, prefix: Path) -> None:
    """Hugging Face's `datasets`: tokenized by `map`, one process a core, and written from its rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    with tempfile.TemporaryDirectory(dir=prefix.parent) as cache:
        rows = load_dataset("json", data_files=[str(path) for path in sources], split="train", cache_dir=cache)
        rows = rows.map(tokenize, batched=True, num_proc=NUM_CORES, remove_columns=rows.column_names)
        _write((row["input_ids"] for row in rows), len(tokenizer), prefix)


def tokenizers_loop(sources: list[Path], tokenizer_folder: Path, prefix: Path) -> None:
    """A loop around `tokenizers`, which encodes a batch on all cores."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end_of_text_id = tokenizer.token_to_id(END_OF_TEXT)

    def documents() -> Iterator[list[int]]:
        for batch in batched_texts(sources):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield [*encoding.ids, end_of_text_id]

    _write(documents(), tokenizer.get_vocab_size(), prefix)


def datatrove(sources: list[Path], tokenizer_folder: Path, prefix: Path) -> None:
    """datatrove's local executor: a task for every source, one process a core."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    names = prefix.parent / "sources.txt"
    names.write_text("\n".join(path.name for path in sources) + "\n")
    LocalPipelineExecutor(
        [
            JsonlReader(str(sources[0].parent), paths_file=str(names)),
            MegatronDocumentTokenizer(
                str(prefix.parent),
                save_filename=prefix.name,
                tokenizer_name_or_path=str(tokenizer_folder / "tokenizer.json"),
                eos_token=END_OF_TEXT,
            ),
        ],
        tasks=len(sources),
        workers=NUM_CORES,
        logging_dir=str(prefix.parent / "logs"),
    ).run()


def batched_texts(sources: list[Path]) -> Iterator[list[str]]:
    for path in sources:
        with open(path, encoding="utf-8") as lines:
            while batch := [json.loads(line)["text"] for line in islice(lines, 1000)]:
                yield batch


def _write(documents: Iterable[list[int]], vocab_size: int, prefix: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


PEERS: dict[str, Callable[[list[Path], Path, Path], None]] = {
    "datasets.map": datasets_map,
    "tokenizers loop": tokenizers_loop,
    "datatrove": datatrove,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--sources", nargs="+", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prefix", type=Path, required=True, help="of the .bin and .idx; its folder is empty")
    arguments = parser.parse_args()
    PEERS[arguments.name](arguments.sources, arguments.tokenizer, arguments.prefix)


if __name__ == "__main__":
    main()
