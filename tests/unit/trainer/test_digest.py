"""The digest of what a step was fed: against hand-made bytes, and what it must and must not tell apart."""

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.digest import as_hex, digest, from_hex, sample_digests, together

WORDS = st.integers(0, 2**64 - 1)


def tokens_of(seed: int, num_samples: int = 12) -> torch.Tensor:
    return torch.randint(0, 60_000, (num_samples, 9), generator=torch.Generator().manual_seed(seed))


def test_it_is_the_sum_of_hashes_of_little_endian_int64() -> None:
    tokens = tokens_of(1)
    by_hand = [xxhash.xxh3_64_intdigest(struct.pack("<9q", *row)) for row in tokens.tolist()]
    assert sample_digests(tokens).tolist() == by_hand
    assert digest(tokens) == sum(by_hand) % 2**64 and sum(by_hand) > 2**64
    assert digest(tokens[:0]) == 0
    assert digest(torch.tensor([[1, 2, 3]])) == 0x7C68B4906E7EA780  # as the first version computed it: runs record it


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_the_type_of_a_token_plays_no_part(dtype: torch.dtype) -> None:
    tokens = tokens_of(2) % 30_000
    assert digest(tokens.to(dtype)) == digest(tokens)


@given(seed=st.integers(0, 99), order=st.permutations(range(12)), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_order_and_split_play_no_part(seed: int, order: list[int], cuts: list[int]) -> None:
    tokens = tokens_of(seed)
    shuffled, places = tokens[order], [0, *sorted(cuts), 12]
    parts = [shuffled[start:end] for start, end in pairwise(places)]
    assert sum(digest(part) for part in parts) % 2**64 == digest(tokens)


def test_every_change_of_a_token_and_every_repeat_shows() -> None:
    tokens = tokens_of(3)
    seen = {digest(tokens), digest(tokens[1:]), digest(torch.cat([tokens, tokens[:1]]))}
    seen |= {digest(torch.cat([tokens[1:], tokens[1:2]])), digest(tokens.flip(1))}
    for place in range(tokens.numel()):
        changed = tokens.clone()
        changed.view(-1)[place] += 1
        seen.add(digest(changed))
    assert len(seen) == 5 + tokens.numel()


@given(values=st.lists(WORDS, min_size=1, max_size=8))
def test_digests_add_up_mod_2_to_the_64(values: list[int]) -> None:
    assert together(*values) == int(np.array(values, np.uint64).sum(dtype=np.uint64))
    assert from_hex(as_hex(together(*values))) == together(*values) and len(as_hex(together(*values))) == 16
