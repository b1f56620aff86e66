# SPDX-License-Identifier: Apache-2.0
"""Which document a token belongs to, found in the store without reading all of it."""

from typing import NamedTuple

import numpy as np

from lm_scale.data.store import TokenStore

# Documents whose beginnings are read at once: those of a chunk of a store's offsets.
_BLOCK = 2048


class Piece(NamedTuple):
    """Tokens that stand together in a store, of one document."""

    document: int
    first: int  # counted from the document's first token
    tokens: int  # of the document, in this piece
    whole: int  # tokens of the whole document


def document_at(store: TokenStore, token: int) -> int:
    """The document that holds this token of the store (both counted from 0).

    Reads one beginning for each halving of the documents, then a block of them.
    Raises IndexError if there is no such token.
    """
    if not 0 <= token < store.num_tokens:
        raise IndexError(f"token {token} of {store.num_tokens}")
    low, high = 0, -(-store.num_documents // _BLOCK)  # the block is low ... high - 1
    while high - low > 1:
        middle = (low + high) // 2
        begins = store.spans([middle * _BLOCK])[0, 0]
        low, high = (middle, high) if begins <= token else (low, middle)
    first = low * _BLOCK
    starts = store.spans(range(first, min(first + _BLOCK, store.num_documents)))[:, 0]
    # The last of those that begin here: the ones before it are empty.
    return first + int(np.searchsorted(starts, token, side="right")) - 1


def pieces(store: TokenStore, first: int, stop: int) -> list[Piece]:
    """The documents, and which parts of them, in tokens first ... stop - 1.

    Empty documents are left out. Raises IndexError if there are no such tokens.
    """
    found, token = [], first
    document = document_at(store, first)
    document_at(store, stop - 1)  # or it raises
    while token < stop:
        ((begins, ends),) = store.spans([document]).tolist()
        until = min(ends, stop)
        if until > token:
            whole = ends - begins
            found.append(Piece(document, token - begins, until - token, whole))
            token = until
        document += 1
    return found
