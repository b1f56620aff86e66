# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: what is in it, by which it can be checked.

It is the last file to be written into a checkpoint, before the folder gets its name. A
folder without one, or with one that does not fit, is no checkpoint.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from etils import epath

from lm_scale.errors import one_line
from lm_scale.hashing import Index

NAME = "manifest.json"
FORMAT = 1
SMALL = 2**20  # bytes; a file that is no larger is hashed as a whole
LATER = "_CHECKPOINT_METADATA"  # to which orbax adds a time when it has been listed


@dataclass(frozen=True)
class ArrayFacts:
    """Shape, type and the hash of each shard that was in memory (hashing.py)."""

    shape: tuple[int, ...]
    dtype: str
    shards: dict[Index, int]


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint."""

    step: int
    time: str  # UTC, ISO 8601
    config: dict[str, Any]  # of the run, resolved
    tokens: dict[str, Any]  # fingerprint of the training tokens
    left_out: tuple[tuple[int, int], ...]  # batch numbers that training passes over
    eval_loss: float | None  # held-out loss of these weights, if it was measured
    versions: dict[str, str]  # of lm_scale and the libraries
    arrays: dict[str, ArrayFacts]  # by path, e.g. params.blocks.qkv
    files: dict[str, tuple[int, str | None]]  # size (bytes), sha256 of small ones
    # Where a run that trains from a stream goes on (data/streamed.py).
    stream: dict[str, Any] | None = None


def write(manifest: Manifest, folder: epath.Path) -> None:
    """Adds the files of the folder, as they are now, and writes the manifest."""
    files = {}
    for path in walk(folder):
        if path.name not in (LATER, NAME):
            name = path.relative_to(folder).as_posix()
            files[name] = file_facts(path)
    body = _to_json(dataclasses.replace(manifest, files=files))
    text = json.dumps({**body, "digest": _digest(body)})
    (folder / NAME).write_text(text)


def read(folder: epath.Path) -> Manifest:
    """The manifest of a checkpoint; ValueError saying why the folder is none."""
    try:
        body = json.loads((folder / NAME).read_text())
        digest = body.pop("digest")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"it has no {NAME}: it was never finished") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"its {NAME} cannot be read ({one_line(error, 100)})"
        ) from None
    if digest != _digest(body):
        raise ValueError(f"its {NAME} has been altered")
    if body["format"] != FORMAT:
        raise ValueError(
            f"it has format {body['format']}, this version of lm_scale reads {FORMAT}"
        )
    return _from_json(body)


def check_files(manifest: Manifest, folder: epath.Path) -> None:
    """ValueError naming the first file that is missing or altered; reads little."""
    for name, (size, sha256) in manifest.files.items():
        try:
            found, digest = file_facts(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"its file {name} is missing") from None
        if found != size:
            raise ValueError(f"its file {name} has {found:,} bytes instead of {size:,}")
        if digest != sha256:
            raise ValueError(f"its file {name} has been altered")


def file_facts(path: epath.Path) -> tuple[int, str | None]:
    """Size (bytes), and the hash of a small file."""
    size = path.stat().length
    if size > SMALL:
        return size, None
    return size, hashlib.sha256(path.read_bytes()).hexdigest()


def walk(folder: epath.Path) -> list[epath.Path]:
    """All files under a folder; a link is not followed."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_link(path):
            found += walk(path)
        else:
            found.append(path)
    return found


def is_link(path: epath.Path) -> bool:
    """If a local path is a symbolic link; an object store has none."""
    return is_local(path) and os.path.islink(path)


def is_local(path: epath.Path) -> bool:
    """If a path is on a file system, and not in an object store (gs://)."""
    return re.match(r"\w+://", str(path)) is None


def name_of(index: Index) -> str:
    """A part of an array as text, `0:2,16:32`; that of a scalar is empty."""
    return ",".join(f"{start}:{stop}" for start, stop in index)


def _index(name: str) -> Index:
    parts = [part.split(":") for part in name.split(",") if part]
    return tuple((int(start), int(stop)) for start, stop in parts)


def _to_json(manifest: Manifest) -> dict[str, Any]:
    arrays = {
        path: {
            "shape": facts.shape,
            "dtype": facts.dtype,
            "shards": {name_of(i): f"{h:08x}" for i, h in facts.shards.items()},
        }
        for path, facts in manifest.arrays.items()
    }
    body = {"format": FORMAT, **vars(manifest), "arrays": arrays}
    return json.loads(json.dumps(body))  # tuples as lists, as they are read again


def _from_json(body: dict[str, Any]) -> Manifest:
    arrays = {
        path: ArrayFacts(
            tuple(facts["shape"]),
            facts["dtype"],
            {_index(name): int(value, 16) for name, value in facts["shards"].items()},
        )
        for path, facts in body["arrays"].items()
    }
    names = [field.name for field in dataclasses.fields(Manifest)]
    # Checkpoints of older versions have no `stream`.
    fields = {name: body[name] for name in names if name in body or name != "stream"}
    fields["arrays"] = arrays
    fields["left_out"] = tuple((first, stop) for first, stop in body["left_out"])
    fields["files"] = {name: tuple(facts) for name, facts in body["files"].items()}
    return Manifest(**fields)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
