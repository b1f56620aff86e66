# SPDX-License-Identifier: Apache-2.0
"""Training straight from a corpus: endless examples, and the place to go on from.

A stream is read in lanes, each by itself. A lane walks through its shards, in a new
order each epoch; takes the documents a window at a time, shuffles each window,
tokenizes it, joins what it gets and cuts it into examples of equal length. All of that
follows from (config, seed), so the place of a lane is six numbers: where its window
begins, and how much of the shuffled window is used. Going on reads the window again.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from lm_scale.data.ahead import Ahead
from lm_scale.data.encoding import Texts, Tokens
from lm_scale.data.shards import Shards
from lm_scale.data.texts import batches
from lm_scale.errors import InputError

Encode = Callable[[Texts], Tokens]
# A window of very long documents ends early: it is in memory, twice.
WINDOW_CHARACTERS = 1 << 26


@dataclass(frozen=True)
class Position:
    """A place in a lane: the next example begins there."""

    epoch: int = 0
    place: int = 0  # of the shard in the epoch's order; there, and from `row` of it on,
    row: int = 0  # the window was read
    window: int = 0  # of the epoch
    document: int = 0  # of the shuffled window
    token: int = 0  # of that document
    example: int = 0  # made so far


@dataclass(frozen=True)
class Window:
    """Documents that are shuffled among one another."""

    start: Position
    texts: list[str]  # shuffled


class Lane:
    """One of `of` lanes (number 0 ...), from `position` on.

    If the shards divide evenly among the lanes, a lane reads each `of`-th of them; else
    it reads all, and keeps each `of`-th row. Blocks run on across the end of an epoch:
    every token is used once an epoch.

    Args:
        buffer: documents of a window; the first of an epoch is smaller, by chance, so
            that each epoch has other neighbours.
        length: tokens of an example.
        encode: the tokens of some texts, such as an `Encoder`.
    """

    def __init__(
        self,
        shards: Shards,
        encode: Encode,
        *,
        number: int,
        of: int,
        seed: int,
        buffer: int,
        length: int,
        position: Position = Position(),
    ):
        self.shards, self.encode = shards, encode
        self.number, self.of, self.length = number, of, length
        self.seed, self.buffer = seed, buffer
        self._own = shards.count % of == 0  # shards, not just rows
        self._at = position
        self._left = np.empty(0, np.int32)  # of the document at `_at`
        self._used = self._ignore = position.token
        self._examples = position.example
        self._stopped = threading.Event()
        begin = replace(position, document=0, token=0, example=0)
        self._windows = Ahead(self._read(begin), 1)
        self._documents = self._encoded(position.document)

    @property
    def position(self) -> Position:
        """Where the next example begins."""
        return replace(self._at, token=self._used, example=self._examples)

    def take(self, count: int) -> np.ndarray:
        """The next examples, int32 [count length].

        Raises:
          InputError: there is no text, or less than an example of it, or as `texts`.
          SourceLost: the source cannot be reached any more.
        """
        pieces, missing = [], count * self.length
        while missing:
            if self._left.size == 0:
                self._next_document()
            pieces.append(self._left[:missing])
            self._left = self._left[missing:]
            self._used += pieces[-1].size
            missing -= pieces[-1].size
        self._examples += count
        return np.concatenate(pieces).reshape(count, self.length)

    def close(self) -> None:
        """Ends its thread; nothing can be taken any more."""
        self._stopped.set()
        self._windows.close()

    def _next_document(self) -> None:
        self._at, tokens = next(self._documents)
        self._left, self._used = tokens[self._ignore :], self._ignore
        self._ignore = 0

    def _encoded(self, first: int) -> Iterator[tuple[Position, np.ndarray]]:
        """Documents in the order of training, from number `first` of a window on."""
        epoch, tokens = None, 0
        for window in self._windows:
            start = window.start
            if epoch is not None and start.epoch > epoch and tokens < self.length:
                raise InputError(
                    f"{self._name} has {tokens} tokens, fewer than one sequence of "
                    f"{self.length}. Give more text or shorten `seq_len`."
                )
            if start.epoch != epoch:
                whole = first == 0 and start == Position(start.epoch)
                epoch, tokens = start.epoch, 0 if whole else self.length
            for document, ids in _tokens(window.texts, first, self.encode):
                tokens += ids.size
                yield replace(start, document=document), ids
            first = 0

    def _read(self, at: Position) -> Iterator[Window]:
        """The windows from the one that begins at this place on, without end."""
        while True:
            empty = (at.place, at.row) == (0, 0)
            for window in self._read_epoch(at):
                empty = False
                yield window
            if empty:
                raise InputError(
                    f"{self._name} holds no document to train on; give more text, or "
                    f"hold less of it out (validation_fraction)."
                )
            at = Position(epoch=at.epoch + 1)

    def _read_epoch(self, at: Position) -> Iterator[Window]:
        start, texts, characters = at, [], 0
        for place, row, text in self._rows(at):
            texts.append(text)
            characters += len(text)
            full = len(texts) >= self._size(start) or characters >= WINDOW_CHARACTERS
            if full:
                yield self._shuffled(start, texts)
                number = start.window + 1
                start = Position(at.epoch, place, row + 1, window=number)
                texts, characters = [], 0
        if texts:
            yield self._shuffled(start, texts)

    def _rows(self, at: Position) -> Iterator[tuple[int, int, str]]:
        """The lane's documents of an epoch, with their places, from a place on."""
        order = self._shards_of(at.epoch)
        for place in range(at.place, len(order)):
            first = at.row if place == at.place else 0
            texts = self.shards.texts(order[place], first, self._stopped)
            for row, text in texts:
                if self._own or row % self.of == self.number:
                    yield place, row, text

    def _shards_of(self, epoch: int) -> list[int]:
        step, first = (self.of, self.number) if self._own else (1, 0)
        shards = np.arange(first, self.shards.count, step)
        return shards[np.argsort(self._random(shards.size, 1, epoch))].tolist()

    def _size(self, start: Position) -> int:
        if start.window > 0:
            return self.buffer
        (value,) = self._random(1, 2, start.epoch)
        return 1 + int(value % np.uint64(self.buffer))

    def _shuffled(self, start: Position, texts: list[str]) -> Window:
        order = np.argsort(self._random(len(texts), 3, start.epoch, start.window))
        return Window(start, [texts[i] for i in order])

    def _random(self, count: int, *key: int) -> np.ndarray:
        """uint64 [count] by key: raw, as numpy may change what it makes of them.

        Keys are told apart by their first number, as trailing zeros do not count.
        """
        sequence = np.random.SeedSequence((self.seed, self.number, *key))
        return np.random.Philox(sequence).random_raw(count)

    @property
    def _name(self) -> str:
        lane = f", lane {self.number} of {self.of}," if self.of > 1 else ""
        return f"the stream of {self.shards.source}{lane}"


def _tokens(
    texts: list[str], first: int, encode: Encode
) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens, int32, of each text from number `first` on, with its number."""
    documents, begun = enumerate(texts[first:], first), []
    for batch in batches(documents, np.empty(0, bool), mark=False):
        if not batch.texts:  # the mark at the end
            return
        found = encode(batch.given)
        each = np.split(found.tokens.astype(np.int32), np.cumsum(found.lengths)[:-1])
        if not batch.ends:
            begun += each
            continue
        each[0] = np.concatenate([*begun, each[0]])
        begun = []
        for end, ids in zip(batch.rows, each, strict=True):
            yield end - 1, ids
