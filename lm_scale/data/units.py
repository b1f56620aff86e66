# SPDX-License-Identifier: Apache-2.0
"""The rows of a source cut into units: what is read, and restarted, by itself.

The units and their order depend on the source alone, never on who reads them: runs of
files of a stream, ranges of rows of an Arrow dataset, or all of it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_scale.data.sources import Rows
from lm_scale.errors import InputError

UNIT_BYTES = 16 << 20  # small files are taken together until they are so large
UNIT_ROWS = 1 << 20  # of an Arrow dataset
MOST_UNITS = 1 << 13  # of any source: each costs some file operations
_BATCH = 1000  # rows taken from Arrow at once


@dataclass(frozen=True)
class Unit:
    """Some rows of a source, in order; they can be read more than once."""

    name: str  # for a person: its files or rows
    rows: Rows
    files: tuple[Path, ...] = ()  # here, if they are known
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of these files

    @property
    def bytes(self) -> int | None:
        """Of its files; None: they are not known."""
        return self.fingerprint.get("bytes")


def cut(rows: Rows, files: list[Path], *, whole: bool) -> list[Unit]:
    """The units of a source's rows.

    files: those of the source that are here, in its order; empty: not known.
    whole: a single unit, for what has to be read in one go.
    """
    if not whole and is_arrow(rows):
        return _ranges(rows, files)
    shards = int(getattr(rows, "num_shards", 1))
    if whole or shards == 1:
        return [Unit("all", rows, tuple(files), fingerprint(files))]
    known = files if len(files) == shards else []
    number = min(shards, MOST_UNITS)
    if known:
        size = sum(file.stat().st_size for file in known)
        number = min(number, max(1, -(-size // UNIT_BYTES)))
    stream: Any = rows
    units = []
    for i in range(number):
        first, last = _bounds(shards, number, i)
        own = known[first:last]
        name = f"shards {first} to {last - 1} of {shards}"
        if own:
            more = f" to {own[-1].name}" if len(own) > 1 else ""
            name = f"{own[0].name}{more}"
        part = stream.shard(number, i)
        units.append(Unit(name, part, tuple(own), fingerprint(own or files)))
    return units


def _bounds(shards: int, number: int, i: int) -> tuple[int, int]:
    """The shards of the i-th of `number` runs, as `IterableDataset.shard` cuts them."""
    size, more = divmod(shards, number)
    first = size * i + min(i, more)
    return first, first + size + (i < more)


def _ranges(rows: Any, files: list[Path]) -> list[Unit]:
    size = max(UNIT_ROWS, -(-len(rows) // MOST_UNITS))
    mark = fingerprint(files)
    spans = [
        (start, min(start + size, len(rows)))
        for start in range(0, max(1, len(rows)), size)
    ]
    return [
        Unit(f"rows {a} to {b - 1}", rows.select(range(a, b)), tuple(files), mark)
        for a, b in spans
    ]


def fingerprint(files: list[Path]) -> dict[str, Any]:
    """What tells if files have changed: of their names, sizes and times."""
    if not files:
        return {}
    facts = [(file.name, (x := file.stat()).st_size, x.st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    size = sum(size for _, size, _ in facts)
    return {"files": len(files), "bytes": size, "sha256": digest}


def is_arrow(rows: Any) -> bool:
    """If rows are a Dataset, whose class takes 2 s to import."""
    return hasattr(rows, "select_columns") and hasattr(rows, "__len__")


def first_row(rows: Any) -> dict[str, Any] | None:
    """The first row; None: there is none."""
    return next(iter(rows), None)


def column_of(row: dict[str, Any], source: str, wanted: str | None) -> str:
    """The column of text: the wanted one, else "text", else the first of strings.

    Raises InputError if there is none.
    """
    strings = [name for name, value in row.items() if isinstance(value, str)]
    name = wanted or ("text" if "text" in row else next(iter(strings), None))
    if name in row:
        return name
    raise InputError(
        f"{source} has no column {'of strings' if name is None else repr(name)}; its "
        f"columns are {', '.join(row)}: name one by text_column."
    )


def values(
    rows: Any, source: str, column: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, list[Any]]]:
    """The column's values from row `start` to before `stop`, with their first row.

    In runs of some hundreds; taken from Arrow where it is behind the rows, without a
    dict for each. Raises InputError where a row has no such column.
    """
    place = 0
    for run in _runs(rows, source, column):
        first, after = place, place + len(run)
        place = after
        if after <= start:
            continue
        if stop is not None and first >= stop:
            return
        low = max(0, start - first)
        kept = run[low : None if stop is None else stop - first]
        yield first + low, _python(kept)


def _runs(rows: Any, source: str, column: str) -> Iterator[Any]:
    """Runs of the column's values, as Arrow or as a list."""
    if not hasattr(rows, "with_format"):
        run: list[Any] = []
        for row in rows:
            run.append(row[column if column in row else column_of(row, source, column)])
            if len(run) == _BATCH:
                yield run
                run = []
        if run:
            yield run
        return
    if is_arrow(rows) and len(rows) == 0:
        return
    if not is_arrow(rows):
        # `datasets` keeps in a stream how far it has been read: where two threads read
        # one, the one would begin where the other is. All its shards are a new one.
        rows = rows.shard(1, 0)
    # Its column alone: files may be unlike one another in the others.
    tables = rows.select_columns(column).with_format("arrow").iter(_BATCH)
    try:
        for table in tables:
            yield table[column]
    except KeyError:  # a file without it
        for row in rows:
            column_of(row, source, column)
        raise


def _python(run: Any) -> list[Any]:
    if isinstance(run, list):
        return run
    import pyarrow

    found = run.to_pylist()
    if isinstance(run.type, pyarrow.JsonType):  # values of several kinds, each as JSON
        found = [None if value is None else json.loads(value) for value in found]
    return found
