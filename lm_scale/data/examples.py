# SPDX-License-Identifier: Apache-2.0
"""What one example of a token store is: a block of its tokens, or one document."""

import numpy as np

from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError


class Blocks:
    """Examples cut from all documents, one after the other, `seq_len` tokens each."""

    padded = False  # an example may be shorter than its row of the batch

    def __init__(self, store: TokenStore, seq_len: int, *, most: int | None = None):
        """most: use so many, from the first on; None: all."""
        self.store, self.seq_len, self.fixed_width = store, seq_len, seq_len
        self.count = store.num_tokens // seq_len  # the last, shorter piece is left
        if self.count == 0:
            raise InputError(
                f"{store.path} holds {store.num_tokens} tokens, fewer than one "
                f"sequence of {seq_len}. Give more text or shorten `seq_len`."
            )
        self.count = min(self.count, most or self.count)
        self.mean_length = float(seq_len)

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The tokens of these examples."""
        return list(self.store.read_blocks(numbers * self.seq_len, self.seq_len))

    def width(self, numbers: np.ndarray) -> int:
        """The length of the rows of a batch with these examples."""
        return self.seq_len


class Documents:
    """Each document is an example, cut to `seq_len` tokens; rows are padded.

    fixed_width: of every batch; None: that of the longest document of a batch, rounded
    up to a multiple of `multiple` (each width is compiled by itself).
    """

    padded = True

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
        self.fixed_width = seq_len if pad_to_seq_len else None
        self.multiple = multiple
        self.count = min(store.num_documents, most or store.num_documents)
        if self.count == 0:
            raise InputError(f"{store.path} holds no document. Give more text.")
        # Tokens of an example, about: the cut ones count in full.
        self.mean_length = min(store.num_tokens / store.num_documents, seq_len)

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The tokens of these documents, cut as the tokenizer would cut them."""
        return [self._cut(tokens) for tokens in self.store.documents(numbers)]

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.size <= self.seq_len:
            return tokens
        cut = tokens[: self.seq_len].copy()
        if tokens[-1] in self.special_ids:
            cut[-1] = tokens[-1]
        return cut

    def width(self, numbers: np.ndarray) -> int:
        """The length of the rows of a batch with these documents."""
        longest = max(1, int(self.store.lengths(numbers).max()))
        return min(-(-longest // self.multiple) * self.multiple, self.seq_len)


Source = Blocks | Documents
