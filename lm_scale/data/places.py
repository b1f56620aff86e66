# SPDX-License-Identifier: Apache-2.0
"""Folders of a token store, by path or url: local disks and object stores alike.

All goes through tensorstore, whose key-value stores replace a file as a whole: what is
read is the old content or the new one, never a piece. Only a folder needs more: on a
local disk it is made elsewhere and renamed; an object store knows no rename, and there
the record that is written last tells that the folder is whole.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import tensorstore as ts

from lm_scale.errors import InputError, StorageError, one_line

ERRORS = (OSError, ValueError, RuntimeError)  # what tensorstore raises
# Of one context, so that memory:// is one place in all of a process.
_CONTEXT = ts.Context()


def url_of(path: str | Path) -> str:
    """The kvstore url of a folder, local or already a url, with a slash at the end."""
    text = str(path)
    if "://" not in text:
        text = Path(os.path.abspath(os.path.expanduser(text))).as_uri()
    return text.rstrip("/") + "/"


def is_renamed(path: str | Path) -> bool:
    """If folders here come into being by a rename: a path, not a url."""
    return "://" not in str(path)


def context(cache_bytes: int = 0) -> ts.Context:
    """A context of its own cache of so many bytes."""
    return ts.Context(
        {"cache_pool": {"total_bytes_limit": cache_bytes}}, parent=_CONTEXT
    )


def read_bytes(path: str | Path, name: str) -> bytes | None:
    """The file of a name in a folder; None: there is none.

    Raises InputError if the place cannot be read.
    """
    return read_many(path, [name])[0]


def read_many(path: str | Path, names: Sequence[str]) -> list[bytes | None]:
    """The same of several, read concurrently."""
    try:
        store = _open(path)
        found = [read.result() for read in [store.read(name) for name in names]]
    except ERRORS as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    return [None if x.state == "missing" else x.value for x in found]


def write_bytes(path: str | Path, name: str, content: bytes) -> None:
    """Makes or replaces a file, as a whole; StorageError if that fails."""
    try:
        _open(path).write(name, content).result()
    except ERRORS as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | Path, error: BaseException) -> StorageError:
    """The error for what could not be stored, such as where a disk is full."""
    return StorageError(
        f"cannot write to {path}: {one_line(error, 300)}. The parts that are finished "
        "stay: make room or repair the storage, and run the same command again."
    )


def commit(scratch: str, place: str) -> None:
    """Renames a whole local folder into its place.

    Another process may have put the same there meanwhile: then it stays.
    """
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        try:
            os.rename(scratch, place)
        except OSError:
            if not os.path.isdir(place):
                raise
            shutil.rmtree(scratch, ignore_errors=True)
        parent = os.open(os.path.dirname(place), os.O_RDONLY)
        try:
            os.fsync(parent)  # a rename outlasts a power cut only then
        finally:
            os.close(parent)
    except OSError as error:
        raise cannot_write(place, error) from error


def remove(path: str | Path) -> None:
    """Removes a folder and all below it; no error for what is gone already."""
    if is_renamed(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        _open(path).delete_range(ts.KvStore.KeyRange()).result()
    except ERRORS as error:
        raise cannot_write(path, error) from error


def _open(path: str | Path) -> ts.KvStore:
    return ts.KvStore.open(url_of(path), context=_CONTEXT).result()
