# SPDX-License-Identifier: Apache-2.0
"""Many short spans of a token store at once, by way of windows kept in memory.

A read of the store costs some 30 µs however short it is, which is most of what a row of
128 tokens takes. So whole windows are read, all that are missing at once, and the spans
are cut out of them.
"""

import threading
from collections import OrderedDict

import numpy as np

from lm_scale.data.arrays import CHUNK_TOKENS
from lm_scale.data.ragged import count_up
from lm_scale.data.store import TokenStore, token_type

WINDOW = CHUNK_TOKENS  # aligned: the least that the store decompresses
BYTES = 256 << 20  # of windows, for each store; those used last stay


class TokenCache:
    """Spans of a store's tokens. Safe to share among threads; pickles by its store."""

    def __init__(self, store: TokenStore, *, window: int = WINDOW):
        """window: tokens that are read at one time."""
        self.store, self._window = store, window
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self.store,)

    def spans(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of these spans, one after the other, int32 [sum of lengths].

        starts, lengths: whole numbers [n]; a length may be 0.
        Raises what `TokenStore.read_blocks` does.
        """
        firsts, begins, ends = self._cut(np.asarray(starts), np.asarray(lengths))
        windows = self._get(np.unique(firsts).tolist())
        parts = [
            windows[number][begin:end]
            for number, begin, end in zip(
                firsts.tolist(), begins.tolist(), ends.tolist(), strict=True
            )
        ]
        if not parts:
            return np.empty(0, np.int32)
        return np.concatenate(parts).astype(np.int32)

    def _cut(self, starts: np.ndarray, lengths: np.ndarray):
        """The spans cut at the windows' edges: numbers of windows, places in them."""
        if starts.size:
            last = self.store.num_tokens
            if starts.min() < 0 or (starts + lengths).max() > last:
                raise IndexError(
                    f"spans from {starts.min()} to before {(starts + lengths).max()} "
                    f"in a store of {last} tokens"
                )
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        first, last = starts // self._window, (starts + lengths - 1) // self._window
        counts = last - first + 1
        numbers = np.repeat(first, counts) + count_up(counts)
        edges = numbers * self._window
        begins = np.maximum(np.repeat(starts, counts), edges) - edges
        ends = np.repeat(starts + lengths, counts)
        return numbers, begins, np.minimum(ends, edges + self._window) - edges

    def _get(self, numbers: list[int]) -> dict[int, np.ndarray]:
        """These windows; the missing ones are read."""
        with self._lock:
            found = {n: self._windows[n] for n in numbers if n in self._windows}
            for number in found:
                self._windows.move_to_end(number)
        missing = [n for n in numbers if n not in found]
        if missing:  # outside the lock: two threads may read the same, at worst
            new = self._read(missing)
            found |= new
            with self._lock:
                self._windows |= new
                self._shrink()
        return found

    def _shrink(self) -> None:
        most = BYTES // (self._window * self._dtype.itemsize)
        while len(self._windows) > most:
            self._windows.popitem(last=False)

    @property
    def _dtype(self) -> np.dtype:
        return token_type(self.store.manifest.vocab_size)

    def _read(self, numbers: list[int]) -> dict[int, np.ndarray]:
        whole = self.store.num_tokens // self._window  # windows; then a shorter one
        full = [n for n in numbers if n < whole]
        starts = np.array(full, np.int64) * self._window
        blocks = self.store.read_blocks(starts, self._window)
        # Copies, so that a window does not keep the others' memory.
        new = {n: x.astype(self._dtype) for n, x in zip(full, blocks, strict=True)}
        if len(full) < len(numbers):
            start = whole * self._window
            rest = self.store.read(start, self.store.num_tokens - start)
            new[whole] = rest.astype(self._dtype)
        return new
