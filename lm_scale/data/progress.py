# SPDX-License-Identifier: Apache-2.0
"""How far a preparation is, on a console that is a terminal."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn


class Shown:
    """Counts of one store's preparation, shown while it is entered.

    task: what is done. size: bytes of the text that is to be read, None: not known.
    """

    def __init__(self, console: Console, task: str, size: int | None):
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._name, self._size = task, size
        self._task = self._progress.add_task(task, total=None)
        self._start = time.perf_counter()
        self._documents = self._tokens = self._read = 0

    def __enter__(self) -> "Shown":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def read(self, characters: int) -> None:
        """So many characters more are read and done with."""
        self._read += characters
        self._draw()

    def add(self, documents: int, tokens: int, characters: int) -> None:
        """So many more are tokenized."""
        self._documents += documents
        self._tokens += tokens
        self.read(characters)

    def _draw(self) -> None:
        seconds = time.perf_counter() - self._start
        text = f"{self._name}: {self._documents:,} documents, {self._tokens:,} tokens, "
        text += f"{self._tokens / seconds:,.0f} tokens/s"
        if self._size and self._read:
            # Characters stand for bytes: of English text they are nearly the same.
            done = min(1.0, self._read / self._size)
            text += f", {done:.0%}, {seconds * (1 - done) / done:,.0f} s left"
        self._progress.update(self._task, description=text)
