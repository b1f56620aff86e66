# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: a corpus is a stream of documents in a fixed order.

Three kinds of source: `python-docs`, the English that ships with every CPython (no
network); files and folders, read by `datasets`; and datasets of the Hugging Face hub.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lm_scale.data.python_docs import python_docs
from lm_scale.data.reading import Reading, first_invalid, reason
from lm_scale.data.sources import Rows, open_rows, split_files
from lm_scale.data.units import Unit, column_of, cut, first_row, is_arrow, values
from lm_scale.errors import InputError

Part = Literal["train", "validation"]
SampleBy = Literal["line", "paragraph", "document"]
Holdout = Literal["hash", "first"]
InvalidUTF8 = Literal["refuse", "replace"]


@dataclass(frozen=True)
class CorpusConfig:
    """Which text to train on and which to evaluate on."""

    # "python-docs"; a file, folder, glob or url (hf://, https://) of txt, json, jsonl,
    # csv or parquet; a folder of `save_to_disk`; or the name of a hub dataset.
    source: str = "python-docs"
    subset: str | None = None  # configuration of a hub dataset, subfolder of a folder
    split: str = "train"  # of a hub dataset, or of a folder whose names tell splits
    text_column: str | None = None  # None: "text", else the first column of strings
    sample_by: SampleBy = "line"  # what a document of a .txt file is
    max_documents: int | None = None  # read so many of a source only, the first
    keep_linebreaks: bool = True  # at the ends of the lines of a .txt file
    keep_blank: bool = False  # texts of white space only, such as a .txt's empty lines
    # Evaluate on this (same kinds as source); None: on the validation split of source,
    # if it has one, else on documents held out of it.
    validation_source: str | None = None
    validation_fraction: float = 0.05  # share of documents held out
    # Which documents: "hash", chosen by a hash of their text; "first", the first rows,
    # as the slice train[:5%] of `datasets` takes them.
    holdout: Holdout = "hash"
    # Of documents with the same text in a part only the first is kept, by `prepare`.
    drop_duplicates: bool = False
    # Bytes of txt, csv and json that are no UTF-8: an error, or U+FFFD for each.
    invalid_utf8: InvalidUTF8 = "refuse"
    # False: the files are read into an Arrow cache on disk first, then memory mapped.
    streaming: bool = True

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction is {self.validation_fraction}; expected a share "
                "of the documents, at least 0 and less than 1."
            )
        if self.max_documents is not None and self.max_documents < 1:
            raise InputError(
                f"max_documents is {self.max_documents}; expected a number above 0."
            )
        for name, choices in (
            ("sample_by", SampleBy),
            ("holdout", Holdout),
            ("invalid_utf8", InvalidUTF8),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise InputError(
                    f"{name} is {value!r}; expected one of "
                    f"{', '.join(get_args(choices))}."
                )
        if self.holdout == "first" and self.streaming and self.source != "python-docs":
            raise InputError(
                "holdout is 'first' and streaming is True, but a stream has no number "
                "of rows to take the first share of; set streaming to False, or "
                "holdout to 'hash'."
            )


def documents(
    config: CorpusConfig,
    part: Part,
    *,
    cache_dir: str | None = None,
    workers: int | None = None,
) -> Iterator[str]:
    """The documents of one part of the corpus, in the same order at every call.

    Validation is `validation_source` if given, else the "validation" split of a hub
    dataset or folder that has one, else the share of the documents that `holdout`
    chooses: by a hash of their text, so that equal documents never straddle the two
    parts, or the first rows, dropped ones counted. Empty documents are dropped, and
    without `keep_blank` those of white space only. Duplicates are not: that is done
    by `prepare`. Memory does not grow with the corpus.

    cache_dir: where downloads and Arrow files go (None: Hugging Face's default).
    workers: processes that read files into Arrow, if not streaming (None: this one).
    Neither changes the documents.

    Raises:
      InputError: at the call for a source that is missing, unreadable or empty; while
        iterating for a row that cannot be read.
    """
    text = open_text(config, part, cache_dir=cache_dir, workers=workers)
    found = (
        document
        for unit in text.units
        for _, document in text.read(unit)
        if document is not None
    )
    first = list(itertools.islice(found, 1))  # errors surface here, not hours later
    if not first and text.units:
        text.check_any()
    return itertools.chain(first, found)


@dataclass(frozen=True)
class Text:
    """One part of a corpus, open: its units, and how a unit is read."""

    source: str
    config: CorpusConfig
    units: list[Unit]
    column: str | None = None  # that holds the text; None: there is no row
    held_out: bool | None = None  # keep what the hash holds out, or the rest; None: all
    others: bool = False  # further rows, of the other part, are in no unit

    def read(self, unit: Unit, start: int = 0) -> Iterator[tuple[int, str | None]]:
        """The unit's documents from row `start` on, each with the number of its row.

        None stands for a row without text. Rows of the other part are left out.

        Raises:
          InputError: a row cannot be read or holds no string.
        """
        share, stop = self.config.validation_fraction, self.config.max_documents
        blank, held_out = self.config.keep_blank, self.held_out
        if self.column is None:
            return
        try:
            runs = values(unit.rows, self.source, self.column, start, stop)
            for first, run in runs:
                for row, text in enumerate(run, first):
                    if not isinstance(text, str):
                        self._check_null(text)
                        yield row, None
                    elif not text or (not blank and text.isspace()):
                        yield row, None
                    elif held_out is None or _held_out(text, share) == held_out:
                        yield row, text
        except InputError:
            raise
        except (OSError, ValueError) as error:  # bad bytes, broken json, a lost line
            raise self._unreadable(unit, error) from error

    def check_any(self) -> None:
        """InputError if the source has no text at all, of this part or another."""
        if self.others:
            return  # the other part has them
        everything = Text(self.source, self.config, self.units, self.column)
        for unit in self.units:
            if any(text is not None for _, text in everything.read(unit)):
                return
        raise InputError(f"the corpus {self.source} holds no text; give one that does.")

    def _check_null(self, value: Any) -> None:
        if value is not None:
            raise InputError(
                f"column {self.column!r} of {self.source} holds {value!r:.40} where a "
                "string was expected; name a column of text by text_column."
            )

    def _unreadable(self, unit: Unit, error: Exception) -> InputError:
        where = first_invalid(unit.files) if "codec can't decode" in str(error) else ""
        return InputError(f"cannot read {self.source}: {reason(error)}{where}")


def open_text(
    config: CorpusConfig,
    part: Part,
    *,
    cache_dir: str | None = None,
    workers: int | None = None,
    whole: bool = False,
) -> Text:
    """One part of the corpus, cut into units; see `documents`.

    whole: in a single unit, as `max_documents` makes it, too.

    Raises:
      InputError: the source is missing or unreadable, or its first row is.
    """
    validating = part == "validation"
    separate = config.validation_source is not None
    source = (config.validation_source if validating else None) or config.source
    reading = Reading(
        streaming=config.streaming,
        cache_dir=cache_dir,
        workers=workers,
        text={"sample_by": config.sample_by, "keep_linebreaks": config.keep_linebreaks},
        replace=config.invalid_utf8 == "replace",
    )
    rows, complete = _rows(config, source, validating, reading)
    share, held_out, others = config.validation_fraction, None, False
    files = _files(config, source, validating)
    most = config.max_documents
    column = _column(rows, source, config, files)
    if not (separate or complete):
        if validating and share == 0:
            return Text(source, config, [])  # not all of a large corpus to find none
        if config.holdout == "hash":
            held_out = validating
        else:
            rows = _first(_take(rows, most), share, validating)
            others = validating
    units = cut(rows, files, whole=whole or most is not None)
    return Text(source, config, units, column, held_out, others)


def _rows(
    config: CorpusConfig, source: str, validating: bool, reading: Reading
) -> tuple[Rows, bool]:
    """All rows of a source; True: they are the wanted part, so hold nothing out."""
    if source == "python-docs":
        builtin = _Builtin()
        return (list(builtin) if config.holdout == "first" else builtin), False
    subset, split = _names(config, source)
    return open_rows(source, subset, split, validating=validating, reading=reading)


def _files(config: CorpusConfig, source: str, validating: bool) -> list[Path]:
    if source == "python-docs":
        return []
    return split_files(source, *_names(config, source), validating=validating)


def _names(config: CorpusConfig, source: str) -> tuple[str | None, str]:
    """Subset and split, which are no names in another source."""
    own = source == config.source
    return (config.subset, config.split) if own else (None, "train")


class _Builtin:
    """The rows of python-docs; they can be read more than once."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"text": text} for text in python_docs())


def _column(
    rows: Rows, source: str, config: CorpusConfig, files: list[Path]
) -> str | None:
    """The column of text, by the first row."""
    try:
        row = first_row(rows)
    except (OSError, ValueError) as error:
        unit = Unit("", rows, tuple(files))
        raise Text(source, config, [])._unreadable(unit, error) from error
    return None if row is None else column_of(row, source, config.text_column)


def _take(rows: Any, most: int | None) -> Any:
    if most is None:
        return rows
    return rows.select(range(min(most, len(rows)))) if is_arrow(rows) else rows[:most]


def _held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def _first(rows: Any, share: float, validating: bool) -> Rows:
    """The first rows or the rest, cut where `datasets` cuts for train[:5%]."""
    percent = round(100 * share, 9)  # 100 * 0.07 is 7.000000000000001
    cut = round(percent * len(rows) / 100)
    kept = range(cut) if validating else range(cut, len(rows))
    return rows.select(kept) if is_arrow(rows) else [rows[i] for i in kept]
