# SPDX-License-Identifier: Apache-2.0
"""The rows of a corpus by their numbers: shard s, from row r on, at any time again.

A shard is a unit of the corpus (units.py). So a place in a corpus is two numbers, and
to go on there costs the unit's rows before it. (The `state_dict` of `datasets` leaves
out what is in a shuffle buffer.)
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator

from lm_scale.data.corpus import CorpusConfig, open_text
from lm_scale.data.reading import reason
from lm_scale.errors import InputError, SourceLost

# s from a failed read to the next try: four minutes in all, beside the tries of
# `datasets` itself, and they begin again with each row that is read.
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60)
# What no other try will change: the text is not as it should be, or not there ...
LASTING = (
    ValueError, FileNotFoundError, PermissionError, IsADirectoryError,
    NotADirectoryError,
)  # fmt: skip
# ... or a program is wrong, ours or a library's: its traceback says where.
BUGS = (TypeError, AttributeError, LookupError, AssertionError, NotImplementedError)


class Shards:
    """The training part of a corpus, in `count` shards (numbered from 0).

    Raises InputError, when made, for a source that is missing, unreadable or empty.

    Args:
        cache_dir: of downloads; None: Hugging Face's default.
        tell: gets a line for each read that has to be tried again.
    """

    def __init__(
        self,
        config: CorpusConfig,
        *,
        cache_dir: str | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.source, self.tell = config.source, tell
        self._text = open_text(config, "train", cache_dir=cache_dir)
        if self._text.column is None:
            raise InputError(
                f"the corpus {self.source} holds no text; give one that does."
            )
        self._units = self._text.units
        if config.source == "python-docs":
            # Kept: to parse all of Python's own files again, each epoch, takes seconds
            # in which no other thread gets on.
            self._units = [
                dataclasses.replace(unit, rows=list(unit.rows)) for unit in self._units
            ]
        self.count = len(self._units)

    def texts(
        self, shard: int, row: int, stopped: threading.Event
    ) -> Iterator[tuple[int, str]]:
        """The documents of a shard from this row on, each with the number of its row.

        Rows that are empty, blank or held out have none. A read that fails is tried
        again; see `PAUSES`. Once `stopped`, it ends at the next failure.

        Raises:
          InputError: a row that cannot be read, or holds no text.
          SourceLost: the source cannot be reached any more.
        """
        pauses = iter(PAUSES)
        while not stopped.is_set():
            try:
                for at, text in self._read(shard, row):
                    if text is not None:
                        yield at, text
                    row, pauses = at + 1, iter(PAUSES)
                return
            except BUGS:
                raise
            except Exception as error:  # each file system has errors of its own
                cause = _passing(error)
                pause = next(pauses, None)
                where = f"{self.source}, shard {shard} of {self.count}, row {row}"
                if pause is None:
                    raise SourceLost(
                        f"{where} cannot be read: {reason(cause)} (tried "
                        f"{len(PAUSES) + 1} times, over {sum(PAUSES)} s)."
                    ) from cause
                self.tell(
                    f"{where} cannot be read: {reason(cause):.200}. Trying again in "
                    f"{pause} s."
                )
                stopped.wait(pause)

    def _read(self, shard: int, row: int) -> Iterator[tuple[int, str | None]]:
        return self._text.read(self._units[shard], row)


def _passing(error: Exception) -> BaseException:
    """What made a read fail, if another try may help; else raises the error."""
    if not isinstance(error, InputError):
        return error
    cause = error.__cause__  # of those that `Text.read` has made an InputError of
    if cause is None or isinstance(cause, LASTING):
        raise error
    return cause
