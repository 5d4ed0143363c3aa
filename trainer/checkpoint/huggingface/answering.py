"""Answers of an exported model, by transformers alone: what our ranks answer can be held against it.

No code of ours computes here; of ours are the search for the best of several beams, which transformers divides by
another length penalty, the streams that tokens are drawn from, and the order of the work. Sequences are padded on the
right, where no causal model sees it.

Shapes: b sequences, s sequence, k positions, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainer import device
from trainer.checkpoint.huggingface.configs import CONFIG
from trainer.checkpoint.huggingface.generation import quiet
from trainer.checkpoint.huggingface.verification import ExportMismatch, opened
from trainer.config import UserError
from trainer.data.batches import MicroBatch
from trainer.inference.beam import BeamSearch
from trainer.inference.decoding import drawn, stream
from trainer.inference.requests import Answer, Decoding, Generate, Generated, Request, Score, Scored, Tokens
from trainer.pipeline import WatchLosses
from trainer.progress import Advance, unheard

R = TypeVar("R", Score, Generate)
Numbered = tuple[int, R]
"""A request, with its place among all."""


class HuggingFaceModel:
    """An exported folder, or one of the hub's, as a model that is asked."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        target: device.DeviceKind | None = None,
        max_batch_tokens: int = 4096,
    ) -> None:
        """
        Args:
            dtype: to compute in; of bf16 weights too.
            target: where to compute; CUDA where there is one unless said.
            max_batch_tokens: of all sequences at once, as long as padded; a longer request is answered alone.

        Raises:
            UserError: the folder holds no model that transformers can open.
        """
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} holds no exported model (config.json is missing); export one first")
        try:
            model = opened(folder, dtype)
        except ExportMismatch as error:
            raise UserError(" ".join(str(error).split())) from error
        self._device = torch.device(target or device.resolve("auto"))
        self._model = model.to(self._device).eval()
        self._model.generation_config = transformers.GenerationConfig()  # or its end of text would end every request
        self._max_batch_tokens = max_batch_tokens
        self.context_tokens: int = model.config.max_position_embeddings
        """What it reads at most."""
        self.vocab_size: int = model.config.vocab_size

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request], advance: Advance = unheard) -> list[Answer]:
        """In the order of the requests, which need no order; `advance` hears how many are done.

        Raises:
            ValueError: a request does not fit the context.
        """
        for number, request in enumerate(requests):
            self._check(number, request)
        answers: dict[int, Answer] = {}
        scores = [(number, each) for number, each in enumerate(requests) if isinstance(each, Score)]
        others = [(number, each) for number, each in enumerate(requests) if isinstance(each, Generate)]
        for number, answer in chain(self._score(scores), self._generate(others)):
            answers[number] = answer
            advance(len(answers), len(requests))
        return [answers[number] for number in range(len(requests))]

    @torch.inference_mode()
    def evaluate(
        self, micro_batches: Sequence[MicroBatch], watch: WatchLosses | None = None, advance: Advance = unheard
    ) -> tuple[float, int]:
        """Sum of token losses (nats) and number of tokens, as `trainer.inference.frozen.FrozenModel` has them."""
        total, num_tokens = 0.0, 0
        for number, batch in enumerate(micro_batches, 1):
            tokens = batch.tokens.to(self._device)
            logits = self._model(tokens[:, :-1], use_cache=False).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            weight = torch.ones(len(tokens), device=losses.device) if batch.weight is None else batch.weight
            losses *= weight.to(losses.device)[:, None]
            total += losses.double().sum().item()
            num_tokens += int(weight.sum().item()) * losses.shape[1]
            if watch is not None:
                watch(batch, losses)
            advance(number, len(micro_batches))
        return total, num_tokens

    def _check(self, number: int, request: Request) -> None:
        given, added = (
            (request.context, len(request.continuation) - 1)
            if isinstance(request, Score)
            else (request.prompt, request.max_new_tokens)
        )
        if not given or added < 0 or len(given) + added > self.context_tokens:
            raise ValueError(
                f"request {number} has {len(given)} tokens and {added} to come; the model reads 1 to "
                f"{self.context_tokens}"
            )

    # --------------------------------------------------------------------------------------------------------- scoring

    def _score(self, requests: list[Numbered[Score]]) -> Iterator[tuple[int, Answer]]:
        for batch in _batches(requests, _score_tokens, self._max_batch_tokens):
            inputs = [(*each.context, *each.continuation)[:-1] for _, each in batch]
            first = min(len(each.context) for _, each in batch) - 1
            logits = self._logits(inputs, torch.arange(first, max(map(len, inputs))))
            for row, (number, each) in zip(logits, batch, strict=True):
                start = len(each.context) - 1 - first
                yield number, _scored(row[start : start + len(each.continuation)], each.continuation)

    def _logits(self, sequences: Sequence[Tokens], positions: Tensor) -> Tensor:
        """[b, k, V] at these positions of all sequences; those in the padding mean nothing."""
        padded = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        logits = self._model(padded.to(self._device), logits_to_keep=positions.to(self._device), use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    # ------------------------------------------------------------------------------------------------------ generating

    def _generate(self, requests: list[Numbered[Generate]]) -> Iterator[tuple[int, Answer]]:
        alike: dict[Any, list[Numbered[Generate]]] = defaultdict(list)
        for number, each in requests:
            if each.max_new_tokens == 0:
                yield number, Generated(())
            elif each.decoding.beams > 1:
                alike["beams"].append((number, each))
            else:  # prompts of one length, as not every class can leave out padding before them
                alike[len(each.prompt), replace(each, prompt=())].append((number, each))
        for batch in _batches(alike.pop("beams", []), _beam_tokens, self._max_batch_tokens):
            yield from self._searched(batch)
        for group in alike.values():
            for batch in _batches(group, _generate_tokens, self._max_batch_tokens):
                yield from self._continued(batch)

    def _continued(self, batch: list[Numbered[Generate]]) -> Iterator[tuple[int, Answer]]:
        """By transformers' own decoding; they differ in their prompts alone."""
        _, first = batch[0]
        prompts = torch.tensor([each.prompt for _, each in batch], device=self._device)
        draws = _Draws(first.decoding, [number for number, _ in batch]) if first.decoding.temperature > 0 else None
        with quiet():
            rows = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=_generation_config(first),
                logits_processor=LogitsProcessorList([draws] if draws is not None else []),
            )
        for row, (number, each) in zip(rows[:, prompts.shape[1] :].tolist(), batch, strict=True):
            yield number, Generated(_until(row, each.stop_ids))

    def _searched(self, batch: list[Numbered[Generate]]) -> Iterator[tuple[int, Answer]]:
        """By beams of them all at once. Every step reads them anew: not every class keeps keys and values."""
        searches = [BeamSearch(each.decoding, each.stop_ids, each.max_new_tokens) for _, each in batch]
        while running := [place for place, search in enumerate(searches) if not search.is_done]:
            rows = [[(*batch[place][1].prompt, *beam.tokens) for beam in searches[place].live] for place in running]
            following = self._following([row for group in rows for row in group])
            for place, group, logits in zip(running, rows, following.split([*map(len, rows)]), strict=True):
                searches[place].advance(searches[place].likeliest(_logprobs(group, logits, batch[place][1])))
        for (number, _), search in zip(batch, searches, strict=True):
            yield number, Generated(search.best.tokens)

    def _following(self, sequences: Sequence[Tokens]) -> Tensor:
        """[b, V] after the last token of each."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        positions, places = (lengths - 1).unique(return_inverse=True)
        return self._logits(sequences, positions)[torch.arange(len(sequences)), places]


class _Draws(LogitsProcessor):
    """Leaves of each row the one token that is drawn, from the very stream that a rank would draw from."""

    def __init__(self, decoding: Decoding, numbers: Sequence[int]) -> None:
        """numbers: of the requests, one for each row."""
        self._streams = [stream(decoding.seed, number) for number in numbers]
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature))])
        if decoding.top_k is not None:
            self._warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p is not None and decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = drawn(self._warpers(input_ids, scores), [each.random() for each in self._streams])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _scored(logits: Tensor, continuation: Tokens) -> Scored:
    """Of logits [k, V] before each token."""
    tokens = torch.tensor(continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return Scored(tuple(logprobs.tolist()), bool((logits.argmax(-1) == tokens).all()))


def _logprobs(sequences: Sequence[Tokens], logits: Tensor, request: Generate) -> Tensor:
    """Of the tokens after sequences of one length, fp64; -inf for those that may not follow."""
    tokens = torch.tensor(sequences, device=logits.device)
    if request.decoding.repetition_penalty != 1:
        logits = RepetitionPenaltyLogitsProcessor(request.decoding.repetition_penalty)(tokens, logits)
    logprobs = logits.double().log_softmax(-1)
    if request.decoding.no_repeat_ngram > 0:
        logprobs = NoRepeatNGramLogitsProcessor(request.decoding.no_repeat_ngram)(tokens, logprobs)
    return logprobs


def _generation_config(request: Generate) -> transformers.GenerationConfig:
    decoding = request.decoding
    return transformers.GenerationConfig(
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(request.stop_ids) or None,
        pad_token_id=request.stop_ids[0] if request.stop_ids else 0,
        repetition_penalty=decoding.repetition_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram,
        do_sample=False,  # what is drawn is the only one left
    )


def _until(tokens: Sequence[int], stop_ids: Tokens) -> Tokens:
    """To the first that ends, and with it; padding comes after."""
    ends = (place for place, token in enumerate(tokens, 1) if token in stop_ids)
    return tuple(tokens[: next(ends, len(tokens))])


def _score_tokens(request: Score) -> int:
    return len(request.context) + len(request.continuation) - 1


def _generate_tokens(request: Generate) -> int:
    return len(request.prompt) + request.max_new_tokens


def _beam_tokens(request: Generate) -> int:
    return request.decoding.beams * _generate_tokens(request)


def _batches(requests: list[Numbered[R]], num_tokens: Any, max_tokens: int) -> Iterator[list[Numbered[R]]]:
    """The longest first, so that what does not fit memory says so at once, and little is padded."""
    batch: list[Numbered[R]] = []
    for request in sorted(requests, key=lambda each: num_tokens(each[1]), reverse=True):
        if batch and (len(batch) + 1) * num_tokens(batch[0][1]) > max_tokens:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


class HuggingFaceTokenizer:
    """Text to token ids and back, by transformers alone. Text is plain text: no literal in it becomes a special token,
    and none is put before or after it."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        UserError: the folder holds no tokenizer that transformers can open, or one that ends no text.
        """
        try:
            with quiet():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # what transformers raises has no class of its own
            raise UserError(
                f"transformers cannot open the tokenizer in {folder}: {' '.join(str(error).split())[:200]}"
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer in {folder} has no token that ends a text; name eos_token in its settings")
        self.end_of_text_id: int = self._tokenizer.eos_token_id
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        """The largest token id plus one."""

    def encode(self, text: str) -> list[int]:
        with quiet():  # it warns of long texts
            return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
