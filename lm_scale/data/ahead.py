# SPDX-License-Identifier: Apache-2.0
"""Things made ahead of time, by a thread of their own."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
CLOSING = 5.0  # s that `close` waits for a thread, which may be stuck in a read


class Ahead(Generic[T]):
    """Iterates over `items`, of which a thread makes up to `most` ahead.

    What they raise is raised when all that was made before has been taken; `error` has
    it at once. The last `reserve` are not handed out while more are on the way: who
    sees the error then still has so many to end in good order.

    Args:
        most: items that may wait to be taken, more than `reserve`.
        patience: called, in the thread that takes, once a second that it has to wait.
    """

    def __init__(
        self,
        items: Iterator[T],
        most: int,
        *,
        reserve: int = 0,
        patience: Callable[[], None] = lambda: None,
    ):
        if not 0 <= reserve < most:
            raise ValueError(f"a reserve of {reserve} of {most} items")
        self.error: BaseException | None = None
        self._items, self._most, self._reserve = items, most, reserve
        self._patience = patience
        self._made: deque[T] = deque()
        self._ended = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._make, name="ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        with self._changed:
            while not self._changed.wait_for(self._ready, timeout=1.0):
                self._patience()
            if self._made:
                self._changed.notify_all()
                return self._made.popleft()
        if self.error is not None:
            raise self.error
        raise StopIteration

    def stop(self) -> None:
        """Nothing more is made; what was made is dropped, and iterating ends.

        From here on an error is none: others may have stopped what items are made of.
        """
        with self._changed:
            self._closed = self._ended = True
            self._made.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Stops, and waits for the thread."""
        self.stop()
        self._thread.join(CLOSING)

    def _ready(self) -> bool:
        return self._ended or len(self._made) > self._reserve

    def _make(self) -> None:
        try:
            for item in self._items:
                if not self._keep(item):
                    return
        except BaseException as error:
            if not self._closed:
                self.error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            if isinstance(self._items, Generator):  # in its own thread, not when lost
                self._items.close()

    def _keep(self, item: T) -> bool:
        """Puts it to the others when there is room; False: no more are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._made) < self._most)
            if not self._closed:
                self._made.append(item)
                self._changed.notify_all()
            return not self._closed
