# SPDX-License-Identifier: Apache-2.0
"""What one example of a token store is: a block of its tokens, a document, or a row
that holds several documents (packing.py)."""

from dataclasses import dataclass

import numpy as np

from lm_scale.data.packing import Plan
from lm_scale.data.ragged import count_up
from lm_scale.data.store import TokenStore
from lm_scale.data.token_cache import TokenCache
from lm_scale.errors import InputError


@dataclass(frozen=True)
class Rows:
    """Examples side by side, int32 [B T] each."""

    tokens: np.ndarray
    # 1, 2 ... for the documents of a row, 0 at padding. None: a row is all one text.
    segments: np.ndarray | None = None
    positions: np.ndarray | None = None  # 0, 1 ... in each document; None: in the row


class Blocks:
    """Examples cut from all documents, one after the other, `seq_len` tokens each."""

    def __init__(self, store: TokenStore, seq_len: int, *, most: int | None = None):
        """most: use so many, from the first on; None: all."""
        self.store, self.seq_len, self.fixed_width = store, seq_len, seq_len
        self.cache = TokenCache(store)
        self.count = store.num_tokens // seq_len  # the last, shorter piece is left
        if self.count == 0:
            raise _too_short(store, seq_len)
        self.count = min(self.count, most or self.count)
        self.mean_length = float(seq_len)

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray, width: int, pad_id: int) -> Rows:
        """These examples; `width` is that of their rows, here `seq_len`."""
        lengths = np.full_like(numbers, width)
        tokens = self.cache.spans(numbers * width, lengths)
        return Rows(tokens.reshape(numbers.size, width))

    def width(self, numbers: np.ndarray) -> int:
        """The length of the rows of a batch with these examples."""
        return self.seq_len


class Documents:
    """Each document is an example, cut to `seq_len` tokens; rows are padded.

    fixed_width: of every batch; None: that of the longest document of a batch, rounded
    up to a multiple of `multiple` (each width is compiled by itself).
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        *,
        special_ids: tuple[int, ...],
        pad_to_seq_len: bool,
        multiple: int,
        most: int | None = None,
    ):
        """special_ids: of these, one at the end of a document survives the cut."""
        self.store, self.seq_len, self.special_ids = store, seq_len, special_ids
        self.cache = TokenCache(store)
        self.fixed_width = seq_len if pad_to_seq_len else None
        self.multiple = multiple
        self.count = min(store.num_documents, most or store.num_documents)
        if self.count == 0:
            raise InputError(f"{store.path} holds no document. Give more text.")
        # Tokens of an example, about: the cut ones count in full.
        self.mean_length = min(store.num_tokens / store.num_documents, seq_len)

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray, width: int, pad_id: int) -> Rows:
        """These documents, cut as the tokenizer would cut them, in rows of `width`."""
        starts, stops = self.store.spans(numbers).T
        lengths = np.minimum(stops - starts, self.seq_len)
        flat = self.cache.spans(starts, lengths)
        cut = np.flatnonzero(stops - starts > self.seq_len)
        lasts = self.cache.spans(stops[cut] - 1, np.ones_like(cut))
        stay = np.isin(lasts, self.special_ids)
        flat[np.cumsum(lengths)[cut[stay]] - 1] = lasts[stay]
        tokens, real = _padded(flat, lengths, width, pad_id)
        return Rows(tokens, real.astype(np.int32))

    def width(self, numbers: np.ndarray) -> int:
        """The length of the rows of a batch with these documents."""
        longest = max(1, int(self.store.lengths(numbers).max()))
        return min(-(-longest // self.multiple) * self.multiple, self.seq_len)


class Pieces:
    """Each example is a row of a plan: pieces of documents that do not see each other.

    Positions begin anew in each piece, and segments tell them apart.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, plan: Plan, *, most: int | None = None
    ):
        """most: use so many, from the first on; None: all."""
        self.store, self.seq_len, self.fixed_width = store, seq_len, seq_len
        self.plan, self.cache = plan, TokenCache(store)
        if len(plan) == 0:
            raise _too_short(store, seq_len)
        self.count = min(len(plan), most or len(plan))
        self.mean_length = plan.tokens / len(plan)

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray, width: int, pad_id: int) -> Rows:
        """These rows of the plan; `width` is that of their rows, here `seq_len`."""
        firsts, lasts = self.plan.rows[numbers], self.plan.rows[numbers + 1]
        counts = lasts - firsts
        kth = count_up(counts)
        pieces = np.repeat(firsts, counts) + kth
        lengths = np.asarray(self.plan.lengths[pieces], np.int64)
        flat = self.cache.spans(self.plan.starts[pieces], lengths)
        in_row = np.add.reduceat(lengths, np.cumsum(counts) - counts)
        tokens, real = _padded(flat, in_row, width, pad_id)
        segments = np.zeros(tokens.shape, np.int32)
        segments[real] = np.repeat(kth + 1, lengths)
        positions = np.zeros(tokens.shape, np.int32)
        positions[real] = count_up(lengths)
        return Rows(tokens, segments, positions)

    def width(self, numbers: np.ndarray) -> int:
        """The length of the rows of a batch with these examples."""
        return self.seq_len


def _padded(
    flat: np.ndarray, lengths: np.ndarray, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B width] of so many tokens each, and where they are no padding."""
    real = np.arange(width) < lengths[:, None]
    tokens = np.full(real.shape, pad_id, np.int32)
    tokens[real] = flat
    return tokens, real


def _too_short(store: TokenStore, seq_len: int) -> InputError:
    return InputError(
        f"{store.path} holds {store.num_tokens} tokens, fewer than one "
        f"sequence of {seq_len}. Give more text or shorten `seq_len`."
    )


Source = Blocks | Documents | Pieces
