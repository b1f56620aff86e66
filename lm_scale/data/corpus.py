# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: a corpus is a stream of documents in a fixed order.

Three kinds of source: `python-docs`, the English that ships with every CPython (no
network); files, read as streams by `datasets`; and datasets of the Hugging Face hub.
"""

import ast
import glob
import hashlib
import itertools
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lm_scale.errors import InputError

Part = Literal["train", "validation"]
SampleBy = Literal["line", "paragraph", "document"]

# Extension -> the reader of `datasets` for it.
_READERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# Folders of the standard library that hold tests, programs or other people's packages.
_NOT_STDLIB = {
    "__pycache__",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}


@dataclass(frozen=True)
class CorpusConfig:
    """Which text to train on and which to evaluate on."""

    # "python-docs", a file, a folder, a glob (txt, json, jsonl, csv, parquet) or the
    # name of a hub dataset.
    source: str = "python-docs"
    subset: str | None = None  # configuration of a hub dataset
    split: str = "train"  # split of a hub dataset
    text_column: str | None = None  # None: "text", else the first column of strings
    sample_by: SampleBy = "line"  # what a document of a .txt file is
    # Evaluate on this (same kinds as source); None: on documents held out of source.
    validation_source: str | None = None
    validation_fraction: float = 0.05  # share of documents held out, chosen by hash

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction is {self.validation_fraction}; expected a share "
                "of the documents, at least 0 and less than 1."
            )
        if self.sample_by not in get_args(SampleBy):
            raise InputError(
                f"sample_by is {self.sample_by!r}; expected one of "
                f"{', '.join(get_args(SampleBy))}."
            )


def documents(config: CorpusConfig, part: Part) -> Iterator[str]:
    """The documents of one part of the corpus, in the same order at every call.

    Validation is `validation_source` if given, else the "validation" split of a hub
    dataset that has one, else a share of the documents chosen by a hash of their text,
    so that equal documents never straddle the two parts. Blank documents are dropped.
    The text is streamed: memory does not grow with the corpus.

    Raises:
      InputError: at the call for a source that is missing, unreadable or empty; while
        iterating for a row that cannot be read.
    """
    validating = part == "validation"
    separate = config.validation_source is not None
    source = (config.validation_source if validating else None) or config.source
    texts, whole = _open(config, source, validating)
    texts = (text for text in texts if not text.isspace() and text)
    first = next(texts, None)  # errors surface here, not hours later
    if first is None:
        raise InputError(f"the corpus {source} holds no text; give one that does.")
    texts = itertools.chain([first], texts)
    if separate or whole:
        return texts
    share = config.validation_fraction
    if validating and share == 0:
        return iter(())  # without reading all of a large corpus to find none
    return (text for text in texts if _held_out(text, share) == validating)


def _open(
    config: CorpusConfig, source: str, validating: bool
) -> tuple[Iterator[str], bool]:
    """All texts of a source; True: they are the wanted part, so hold nothing out."""
    if source == "python-docs":
        return _python_docs(), False
    if _is_path(source):
        return _texts(_file_rows(source, config.sample_by), source, config), False
    rows, whole = _hub_rows(config, source, validating)
    return _texts(rows, source, config), whole


def _held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def _python_docs() -> Iterator[str]:
    """Reference-manual sections by name, then the docstrings of each stdlib file."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    for folder, subfolders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = sorted(set(subfolders) - _NOT_STDLIB)
        for name in sorted(files):
            if name.endswith(".py"):
                text = "\n\n".join(_docstrings(Path(folder, name)))
                # A docstring may hold lone surrogates, which UTF-8 cannot.
                yield text.encode(errors="replace").decode()


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a Python file in the order of its lines."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _is_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~"))
        or any(character in source for character in "*?[")
        or Path(source).suffix.lower() in _READERS
        or Path(source).exists()
    )


def _file_rows(source: str, sample_by: SampleBy) -> Iterable[dict[str, Any]]:
    files = _files(source)
    readers = {_READERS[file.suffix.lower()] for file in files}
    if len(readers) > 1:
        raise InputError(
            f"{source} mixes kinds of files ({', '.join(sorted(readers))}); choose one "
            "kind with a glob such as 'folder/**/*.txt'."
        )
    reader = readers.pop()
    options = {"sample_by": sample_by, "keep_linebreaks": True}
    # `datasets` takes each name for a pattern.
    names = [glob.escape(str(file.absolute())) for file in files]
    try:
        return _load(
            reader,
            data_files={"train": names},
            split="train",
            **(options if reader == "text" else {}),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {source}: {_one_line(error)}") from error


def _files(source: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted."""
    known = ", ".join(_READERS)
    path = Path(source).expanduser()
    if path.is_dir():
        below = [file.relative_to(path) for file in sorted(path.rglob("*"))]
        files = [
            path / file
            for file in below
            if file.suffix.lower() in _READERS
            and (path / file).is_file()
            and not any(name.startswith(".") for name in file.parts)
        ]
        if not files:
            raise InputError(f"the folder {source} holds no file of type {known}.")
        return files
    # A file called a[1].txt is itself before it is a pattern.
    matches = [path] if path.is_file() else glob.glob(str(path), recursive=True)
    files = [file for file in map(Path, sorted(matches)) if file.is_file()]
    if not files:
        raise InputError(
            f"no file or folder matches {source}; check the path (relative paths start "
            f"at {Path.cwd()})."
        )
    for file in files:
        if file.suffix.lower() not in _READERS:
            raise InputError(f"cannot read {file}: expected a file of type {known}.")
    return files


def _hub_rows(
    config: CorpusConfig, source: str, validating: bool
) -> tuple[Iterable[dict[str, Any]], bool]:
    """Rows of a hub dataset; True: it has a validation split, so hold nothing out."""
    subset = config.subset if source == config.source else None
    try:
        splits = _load(source, subset)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{source!r} is no file or folder here, and as a hub dataset it failed to "
            f"load: {_one_line(error).rstrip('.')}. Check the name, the subset and the "
            "network; datasets that are Python scripts no longer load (datasets >= 4)."
        ) from error
    # Asked to train on "validation" itself, hold a share of it out instead.
    whole = "validation" in splits and config.split != "validation"
    split = "validation" if whole and validating else config.split
    if split not in splits:
        raise InputError(
            f"the hub dataset {source} has no split {split!r}; "
            f"it has {', '.join(splits)}."
        )
    return splits[split], whole


def _load(*names: Any, **options: Any) -> Any:
    """`datasets.load_dataset` as a stream, without progress bars or download counts."""
    import datasets  # 2 s: only who reads text pays
    import datasets.config

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else local files are reported
    return datasets.load_dataset(*names, streaming=True, **options)


def _texts(
    rows: Iterable[dict[str, Any]], source: str, config: CorpusConfig
) -> Iterator[str]:
    """The column of text. A null is no document."""
    column = None
    try:
        for row in rows:
            if column not in row:  # the first row, or a file that is unlike the first
                column = _column(row, source, column or config.text_column)
            text = row[column]
            if isinstance(text, str):
                yield text
            elif text is not None:
                raise InputError(
                    f"column {column!r} of {source} holds {text!r:.40} where a string "
                    "was expected; name a column of text by text_column."
                )
    except InputError:
        raise
    except (OSError, ValueError) as error:  # bad bytes, broken json, a lost connection
        raise InputError(f"cannot read {source}: {_one_line(error)}") from error


def _column(row: dict[str, Any], source: str, wanted: str | None) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    name = wanted or ("text" if "text" in row else next(iter(strings), None))
    if name in row:
        return name
    raise InputError(
        f"{source} has no column {'of strings' if name is None else repr(name)}; its "
        f"columns are {', '.join(row)}: name one by text_column."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
