# SPDX-License-Identifier: Apache-2.0
"""From the name of a source to its rows: files, folders, urls, datasets of the hub.

All of them are opened by `datasets`, as streams or through its Arrow cache on disk.
"""

import glob
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lm_scale.data.folders import KNOWN, READERS, files_below, files_by_split
from lm_scale.data.reading import Reading, load, reason, text_options
from lm_scale.errors import InputError

Rows = Iterable[Any]  # dicts; a Dataset or an IterableDataset of `datasets`
T = TypeVar("T")

# How archives begin. A tar of texts would pass for text, and `datasets` unpacks the
# others, whatever their names.
_ARCHIVE = re.compile(
    rb"PK\x03\x04|\x1f\x8b|BZh\d1AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf"
    rb"|Rar!\x1a\x07|\x04\x22\x4d\x18|.{257}ustar",
    re.DOTALL,
)

# Known without asking the hub: what the old Flax scripts' README trained on.
_OSCAR = ("oscar", "oscar-corpus/oscar")


def open_rows(
    source: str, subset: str | None, split: str, *, validating: bool, reading: Reading
) -> tuple[Rows, bool]:
    """The rows of a source; True: it has a validation split, so hold nothing out.

    Of a source with named splits the rows are those of `split`, or of "validation" if
    it has that and `validating`. Single files, globs and urls have no named splits.

    Raises:
      InputError: the source is missing or unreadable, or has no such split or subset.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, subset, split, validating, reading)
    if "://" in source:
        return _read_url(source, reading), False
    if _is_path(source):
        return _read_files(_matches(source), source, reading), False
    return _hub(source, subset, split, validating, reading)


def local_files(source: str, subset: str | None = None) -> list[Path]:
    """The files here that a source stands for, of all its splits, sorted.

    They tell by their times if the text is newer than what was made of it. None for
    python-docs, a url, a hub name and what is missing; never raises for these.
    """
    if source in ("", "python-docs") or "://" in source:
        return []
    path = Path(os.path.expanduser(source))  # Path's own raises for a ~user unknown
    if not path.is_dir():
        return _matching(str(path))
    try:
        declared = _declared_subsets(path)
    except InputError:  # a broken README.md is refused when the text is read
        declared = {}
    if not declared or subset not in (None, *declared):
        path = path / (subset or "")
        if not _is_saved(path):
            return files_below(path)
    # Else the rows may be in files of any kind, anywhere below.
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(name.startswith(".") for name in file.relative_to(path).parts)
    )


def split_files(
    source: str, subset: str | None, split: str, *, validating: bool
) -> list[Path]:
    """The files here that `open_rows` reads for a split, in its order.

    Where they cannot be told apart from those of other splits (what `save_to_disk`
    made, a README.md that declares subsets): all of the source. None of a url or a hub
    name. Raises InputError as `open_rows`.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        if not _declared_subsets(path):
            below = path / (subset or "")
            if not _is_saved(below):
                name = f"the folder {below}"
                return _choose(files_by_split(below), name, split, validating)[0]
        return local_files(source, subset)
    if "://" in source or not _is_path(source):
        return []
    return _matches(source)


def _is_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~"))
        or any(character in source for character in "*?[")
        or Path(source).suffix.lower() in READERS
        or Path(source).exists()
    )


def _choose(
    splits: Mapping[Any, T], source: str, split: str, validating: bool
) -> tuple[T, bool]:
    """The wanted split; True: there is a validation split, so hold nothing out."""
    # Asked to train on "validation" itself, hold a share of it out instead.
    whole = "validation" in splits and split != "validation"
    wanted = "validation" if whole and validating else split
    if wanted not in splits:
        raise InputError(
            f"{source} has no split {wanted!r}; it has {', '.join(splits)}."
        )
    return splits[wanted], whole


# --- Files ----------------------------------------------------------------------------


def _matches(source: str) -> list[Path]:
    """The files that a path or glob stands for, sorted."""
    files = _matching(str(Path(source).expanduser()))
    if not files:
        raise InputError(
            f"no file or folder matches {source}; check the path (relative paths start "
            f"at {Path.cwd()})."
        )
    for file in files:
        if file.suffix.lower() not in READERS:
            raise InputError(f"cannot read {file}: expected a file of type {KNOWN}.")
    return files


def _matching(name: str) -> list[Path]:
    """The same, unchecked: none if there are none."""
    # A file called a[1].txt is itself before it is a pattern.
    matches = [name] if Path(name).is_file() else glob.glob(name, recursive=True)
    return [file for file in map(Path, sorted(matches)) if file.is_file()]


def _read_files(files: list[Path], source: str, reading: Reading) -> Rows:
    readers = {READERS[file.suffix.lower()] for file in files}
    if len(readers) > 1:
        raise InputError(
            f"{source} mixes kinds of files ({', '.join(sorted(readers))}); choose one "
            "kind with a glob such as 'folder/**/*.txt'."
        )
    for file in files:
        _check_no_archive(file)
    # `datasets` takes each name for a pattern.
    names = [glob.escape(str(file.absolute())) for file in files]
    return _read(readers.pop(), names, source, reading)


def _check_no_archive(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            found = _ARCHIVE.match(opened.read(512))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}.") from error
    if found:
        raise InputError(
            f"cannot read {file}: it is an archive or compressed; unpack it first."
        )


def _read_url(url: str, reading: Reading) -> Rows:
    """Files elsewhere: `datasets` fetches them and expands patterns."""
    name = url.partition("?")[0] if url.startswith("http") else url
    reader = READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise InputError(
            f"cannot read {url}: expected a file of type {KNOWN}; a dataset of the hub "
            "goes by its plain name, owner/name."
        )
    return _read(reader, [url], url, reading)


def _read(reader: str, names: list[str], source: str, reading: Reading) -> Rows:
    options = text_options(reading) if reader == "text" else {}
    try:
        return load(
            reader,
            reading=reading,
            data_files={"train": names},
            split="train",
            **options,
        )
    except Exception as error:  # a remote file system raises errors of its own
        if "corresponds to no data" in str(error):  # Arrow files without a row
            return []
        raise InputError(f"cannot read {source}: {reason(error)}") from error


# --- Folders --------------------------------------------------------------------------


def _folder(
    path: Path, subset: str | None, split: str, validating: bool, reading: Reading
) -> tuple[Rows, bool]:
    """A folder of files, a copy of a hub dataset, or what `save_to_disk` made."""
    declared = _declared_subsets(path)
    if declared and subset is None:
        subset = _default(path, declared)
    if subset in declared:
        return _declared(path, subset, split, validating, reading)
    if subset is not None:
        path = _subfolder(path, subset, list(declared))
    if _is_saved(path):
        return _saved(path, split, validating)
    files, whole = _choose(
        files_by_split(path),
        f"by the names of its files, the folder {path}",
        split,
        validating,
    )
    return _read_files(files, str(path), reading), whole


def _declared_subsets(path: Path) -> dict[str, dict[str, Any]]:
    """The configurations in the header of a dataset's README.md, by name."""
    readme = path / "README.md"
    if not readme.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        header = metadata_load(readme) or {}
        return {entry["config_name"]: entry for entry in header.get("configs") or []}
    except Exception as error:  # YAML has errors of its own
        raise InputError(
            f"cannot read the header of {readme}: {reason(error)}"
        ) from error


def _default(path: Path, declared: dict[str, dict[str, Any]]) -> str:
    """The configuration that `datasets` takes if none is named."""
    marked = [name for name, entry in declared.items() if entry.get("default")]
    for names in (list(declared), {"default"} & declared.keys(), marked):
        if len(names) == 1:
            return next(iter(names))
    raise InputError(
        f"the README.md of the folder {path} declares the subsets "
        f"{', '.join(declared)}; name one of them by subset."
    )


def _declared(
    path: Path, subset: str, split: str, validating: bool, reading: Reading
) -> tuple[Rows, bool]:
    kinds = {file.suffix.lower() for file in files_below(path)}
    options = text_options(reading) if kinds == {".txt"} else {}
    try:
        splits = load(str(path.absolute()), subset, reading=reading, **options)
    except Exception as error:
        raise InputError(f"cannot read the folder {path}: {reason(error)}") from error
    return _choose(splits, f"the folder {path}", split, validating)


def _subfolder(path: Path, subset: str, declared: list[str]) -> Path:
    names = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if subset in names:
        return path / subset
    there = sorted({*names, *declared})
    raise InputError(
        f"the folder {path} has no subset (subfolder) {subset!r}; it has "
        f"{', '.join(there) or 'no subfolders'}."
    )


def _is_saved(path: Path) -> bool:
    """If `save_to_disk` made this folder."""
    return any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def _saved(path: Path, split: str, validating: bool) -> tuple[Rows, bool]:
    import datasets

    try:
        saved = datasets.load_from_disk(path.absolute())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the folder {path}: {reason(error)}") from error
    if isinstance(saved, dict):
        return _choose(saved, f"the folder {path}", split, validating)
    return saved, False


# --- The hub --------------------------------------------------------------------------


def _hub(
    source: str, subset: str | None, split: str, validating: bool, reading: Reading
) -> tuple[Rows, bool]:
    if source in _OSCAR:
        raise InputError(_is_script(source, subset))
    try:
        splits = load(source, subset, reading=reading)
    except Exception as error:  # the hub's client raises errors of its own
        if "Dataset scripts are no longer supported" in str(error):
            raise InputError(_is_script(source, subset)) from error
        raise InputError(
            f"{source!r} is no file or folder here, and as a hub dataset it failed to "
            f"load: {reason(error).rstrip('.')}. Check the name, the subset and the "
            "network."
        ) from error
    return _choose(splits, f"the hub dataset {source}", split, validating)


def _is_script(source: str, subset: str | None) -> str:
    oscar = source in _OSCAR
    others = (
        "HuggingFaceFW/fineweb-2 (subset nob_Latn for Norwegian), HPLT/HPLT2.0_cleaned "
        "(subset nob_Latn), wikimedia/wikipedia (subset 20231101.no)"
        if oscar
        else "a dataset that is made of files"
    )
    name = "oscar-corpus/oscar" if oscar else source
    owned = name if "/" in name else f"OWNER/{name}"
    # Both names of the folder: train, and partial-train of what exceeds 5 GB.
    return (
        f"the hub dataset {source!r} is a Python script, which datasets 4 and later do "
        f"not run; use {others}, or its parquet conversion, source "
        f"'hf://datasets/{owned}@refs/convert/parquet/{subset or 'default'}/*train/"
        "*.parquet'."
    )
