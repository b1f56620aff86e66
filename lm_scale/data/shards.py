# SPDX-License-Identifier: Apache-2.0
"""The rows of a corpus by their numbers: shard s, from row r on, at any time again.

`datasets` streams a source file by file: each of its shards is one, or several. So a
place in a corpus is two numbers, and to go on there costs one shard's rows before it.
(Its own `state_dict` does not keep what is in a shuffle buffer.)
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from lm_scale.data.corpus import CorpusConfig, _column, _held_out
from lm_scale.data.python_docs import python_docs
from lm_scale.data.reading import Reading, reason
from lm_scale.data.sources import open_rows
from lm_scale.errors import InputError, SourceLost

# s from a failed read to the next try: four minutes in all, beside the tries of
# `datasets` itself, and they begin again with each row that is read.
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60)
# What no other try will change: the text is not as it should be, or not there.
LASTING = (
    ValueError, KeyError, TypeError, NotImplementedError,
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
_BATCH = 1000  # rows taken from Arrow at once
_PARTS = 64  # shards of what lies in one piece, but can be read from any row on


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
        self.config, self.source, self.tell = config, config.source, tell
        rows, whole = _open(config, cache_dir)
        separate = whole or config.validation_source is not None
        self._share = 0.0 if separate else config.validation_fraction
        first = next(iter(rows), None)
        if first is None:
            raise InputError(
                f"the corpus {self.source} holds no text; give one that does."
            )
        # Found once: another row may have other strings, or none.
        self._column = _column(first, self.source, config.text_column)
        self.count = 1
        if config.max_documents is not None:  # the first of all, whichever shards'
            rows = rows.take(config.max_documents)
        else:
            self.count = rows.num_shards
        self._rows = rows

    def texts(
        self, shard: int, row: int, stopped: threading.Event
    ) -> Iterator[str | None]:
        """What each row of a shard holds, from this row on.

        None: no document to train on, as it is empty, blank or held out. A read that
        fails is tried again; see `PAUSES`. Once `stopped`, it ends at the next failure.

        Raises:
          InputError: a row that cannot be read, or holds no text.
          SourceLost: the source cannot be reached any more.
        """
        pauses = iter(PAUSES)
        while not stopped.is_set():
            try:
                for value in self._values(shard, row):
                    yield self._text(value)
                    row, pauses = row + 1, iter(PAUSES)
                return
            except InputError:
                raise
            except LASTING as error:
                raise InputError(
                    f"cannot read {self.source}: {reason(error)}"
                ) from error
            except Exception as error:  # each file system has errors of its own
                pause = next(pauses, None)
                where = f"{self.source}, shard {shard} of {self.count}, row {row}"
                if pause is None:
                    raise SourceLost(
                        f"{where} cannot be read: {reason(error)} (tried "
                        f"{len(PAUSES) + 1} times, over {sum(PAUSES)} s)."
                    ) from error
                self.tell(
                    f"{where} cannot be read: {reason(error):.200}. Trying again in "
                    f"{pause} s."
                )
                stopped.wait(pause)

    def _values(self, shard: int, row: int) -> Iterator[Any]:
        """What the column holds, from this row of the shard on."""
        rows = self._rows
        if self.count > 1:
            rows = rows.shard(num_shards=self.count, index=shard)
        # As tables: eighteen times as fast as a dict a row.
        for table in rows.skip(row).with_format("arrow").iter(_BATCH):
            if self._column not in table.column_names:
                raise InputError(
                    f"shard {shard} of {self.source} has no column {self._column!r}, "
                    f"only {', '.join(table.column_names)}: name one that all have by "
                    f"text_column."
                )
            yield from table[self._column].to_pylist()

    def _text(self, value: Any) -> str | None:
        if not value and isinstance(value, str | None):
            return None
        if isinstance(value, str):
            blank = value.isspace() and not self.config.keep_blank
            return None if blank or _held_out(value, self._share) else value
        raise InputError(
            f"column {self._column!r} of {self.source} holds {value!r:.40} where a "
            "string was expected; name a column of text by text_column."
        )


def _open(config: CorpusConfig, cache_dir: str | None) -> tuple[Any, bool]:
    """An IterableDataset; True: hold nothing out, there is a validation split."""
    import datasets

    text = {"sample_by": config.sample_by, "keep_linebreaks": config.keep_linebreaks}
    reading = Reading(streaming=True, cache_dir=cache_dir, workers=None, text=text)
    if config.source == "python-docs":
        rows, whole = datasets.Dataset.from_dict({"text": list(python_docs())}), False
    else:
        rows, whole = open_rows(
            config.source, config.subset, config.split,
            validating=False, reading=reading,
        )  # fmt: skip
    if isinstance(rows, datasets.Dataset) and len(rows) > 0:  # in memory, or mapped
        rows = rows.to_iterable_dataset(num_shards=min(_PARTS, len(rows)))
    return rows, whole
