# SPDX-License-Identifier: Apache-2.0
"""Texts to tokens, in this process or in a pool of processes, in order.

The workers are new processes (spawned: a fork may hang where JAX runs threads) with one
tokenizer thread each, which import neither JAX nor transformers. A bounded number of
texts is under way, so memory does not grow with the corpus.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
# Characters that this process encodes itself, before it starts a pool: little text
# needs none. It goes on itself until all workers are there.
ALONE = 4 << 20
_AHEAD = 3  # texts under way, for each worker


class WorkerDied(ChildProcessError):
    """A worker process ended, most often as memory ran out; complete by itself."""


@dataclass(frozen=True)
class Spec:
    """All that a process needs to encode."""

    tokenizer: str  # the JSON of `tokenizers`
    end: int | None  # token that follows each document, unless it ends with it anyhow
    dtype: str  # of the tokens


@dataclass(frozen=True)
class Texts:
    """Whole documents, or one piece of a long one."""

    texts: list[str]
    begins: bool = True  # the documents begin here
    ends: bool = True  # and end

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class Tokens:
    """The same as tokens: those of all texts in a row, and how many each has."""

    tokens: np.ndarray  # [n], of Spec.dtype
    lengths: np.ndarray  # [texts] int64


class Encoder:
    """Encodes as the tokenizer does, its special tokens around each document.

    Text that looks like a special token ("<s>" in HTML) stays text.
    """

    def __init__(self, spec: Spec):
        from tokenizers import Tokenizer

        self._spec, self._backend = spec, Tokenizer.from_str(spec.tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        whole = self._backend.encode("a").ids
        bare = self._backend.encode("a", add_special_tokens=False).ids
        place = next(
            (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0
        )
        # What the template adds, for documents that are encoded in pieces.
        self._before, self._after = whole[:place], whole[place + len(bare) :]

    def __call__(self, given: Texts) -> Tokens:
        """The tokens of some texts."""
        whole = given.begins and given.ends
        found = self._backend.encode_batch_fast(given.texts, add_special_tokens=whole)
        rows = [encoding.ids for encoding in found]
        if not whole:
            before = self._before if given.begins else []
            after = self._after if given.ends else []
            rows = [[*before, *row, *after] for row in rows]
        end = self._spec.end
        if end is not None and given.ends:
            for row in rows:
                if not row or row[-1] != end:
                    row.append(end)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = itertools.chain.from_iterable(rows)
        return Tokens(np.fromiter(flat, self._spec.dtype, lengths.sum()), lengths)


class Encoders(Generic[T]):
    """Encodes long rows of texts with several processes; a context manager.

    workers: processes; with 1, and at first (`ALONE`), this one does it.
    """

    def __init__(self, spec: Spec, workers: int):
        self._spec, self._workers = spec, workers
        self._own = Encoder(spec)
        self._alone = 0  # characters encoded here
        self._pool: ProcessPoolExecutor | None = None
        self._begun: list[
            Future[int]
        ] = []  # one for each worker, done when it is there

    def __enter__(self) -> "Encoders[T]":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pool is not None:
            self._lifeline.close()  # the workers end at once, whatever they do
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, items: Iterable[tuple[T, Texts]]) -> Iterator[tuple[T, Tokens]]:
        """The items with their tokens, in order; at most so many are read ahead.

        Raises:
          WorkerDied: a worker was killed.
        """
        items = iter(items)
        while not self._are_there():
            try:
                label, texts = next(items)
            except StopIteration:
                return
            self._alone += texts.characters
            yield label, self._own(texts)
            if self._pool is None and self._workers > 1 and self._alone >= ALONE:
                self._start()
        window: deque[tuple[T, Future[Tokens] | Tokens]] = deque()
        for label, texts in items:
            window.append((label, self._submit(texts)))
            if len(window) > _AHEAD * self._workers:
                yield self._first(window)
        while window:
            yield self._first(window)

    def _are_there(self) -> bool:
        return self._pool is not None and all(one.done() for one in self._begun)

    def _start(self) -> None:
        mine = get_context("spawn")
        theirs, self._lifeline = mine.Pipe(duplex=False)
        with _one_thread():
            self._pool = ProcessPoolExecutor(
                self._workers, mine, initializer=_begin, initargs=(self._spec, theirs)
            )
            # All are started here, while the variables are set.
            self._begun = [self._pool.submit(os.getpid) for _ in range(self._workers)]

    def _submit(self, texts: Texts) -> "Future[Tokens] | Tokens":
        if not texts.texts:
            return self._own(texts)  # a mark between units
        assert self._pool is not None
        try:
            return self._pool.submit(_encode, texts)
        except BrokenProcessPool as error:
            raise _died() from error

    def _first(
        self, window: "deque[tuple[T, Future[Tokens] | Tokens]]"
    ) -> tuple[T, Tokens]:
        label, found = window.popleft()
        try:
            return label, found if isinstance(found, Tokens) else found.result()
        except BrokenProcessPool as error:
            raise _died() from error


def _died() -> WorkerDied:
    return WorkerDied(
        "a process that tokenizes was killed, most often as the machine ran out of "
        "memory. What is finished stays: run the same command again, with fewer "
        "`data.workers`."
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Meanwhile, the variables are set by which a new process has one thread."""
    names = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


# --- In a worker ----------------------------------------------------------------------

_encoder: Encoder


def _begin(spec: Spec, lifeline: Connection) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends us
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    _encoder = Encoder(spec)


def _end_with_parent(lifeline: Connection) -> None:
    lifeline.poll(None)  # until the other end is closed, if only by a kill
    os._exit(1)


def _encode(texts: Texts) -> Tokens:
    return _encoder(texts)
