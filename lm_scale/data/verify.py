# SPDX-License-Identifier: Apache-2.0
"""Reading a token store as a whole, to find what is damaged in it."""

import os
from pathlib import Path

import numpy as np
import tensorstore as ts
from rich.console import Console

from lm_scale.console import say
from lm_scale.data.arrays import digest, reading
from lm_scale.data.places import ERRORS, context, is_renamed
from lm_scale.data.progress import Shown
from lm_scale.data.store import MANIFEST, Manifest, PartEntry, read_manifest
from lm_scale.errors import InputError, one_line

STORES = ("train", "validation")


def stores_at(path: str | Path) -> list[str]:
    """The complete stores at a path: it is one, or some are in it.

    Those of a mixture, in a folder each, are found on disk; below a url give each.

    Raises:
      InputError: there is none, or the manifest of one is broken.
    """
    found = [str(path), *(os.path.join(path, name) for name in STORES)]
    if is_renamed(path):
        below = (Path(path).glob(f"*/{name}") for name in STORES)
        found += sorted(str(each) for some in below for each in some)
    found = [each for each in found if read_manifest(each) is not None]
    if not found:
        raise InputError(
            f"there is no complete token store at {path}, nor in {' or '.join(STORES)} "
            "below it: the path is wrong, or `prepare` has not ended."
        )
    return found


def verify(path: str | Path, console: Console) -> bool:
    """Reads a complete store, compares all of it with its checksums; True: it is whole.

    Says what is damaged and what to do. Memory: a shard.
    """
    manifest = read_manifest(path)
    assert manifest is not None
    damaged: dict[str, list[str]] = {}
    with Shown(console, f"verify {path}", None) as shown:
        for entry in manifest.parts:
            if found := _damages(path, entry, manifest):
                damaged[entry.name] = found
            shown.add(entry.documents, entry.tokens, 0)
    for name, found in damaged.items():
        for damage in found:
            say(console, f"{path}/{name}: {damage}")
    if not damaged:
        say(
            console,
            f"{path}: whole: {len(manifest.parts):,} parts, {manifest.documents:,} "
            f"documents, {manifest.tokens:,} tokens",
        )
        return True
    say(
        console,
        f"{path}: {len(damaged)} of {len(manifest.parts)} parts are damaged. Put whole "
        f"copies there; or delete {MANIFEST} and the folders of these parts and run "
        "`prepare` again: of the same text it makes just these anew.",
    )
    return False


def _damages(path: str | Path, entry: PartEntry, manifest: Manifest) -> list[str]:
    found = []
    for name, size, dtype, sha256 in (
        ("tokens", entry.tokens, manifest.dtype, entry.sha256_tokens),
        ("offsets", entry.documents + 1, "int64", entry.sha256_offsets),
    ):
        spec = reading(f"{str(path).rstrip('/')}/{entry.name}/{name}")
        try:
            array = ts.open(spec, read=True, open=True, context=context()).result()
            there = (array.shape, np.dtype(array.dtype.numpy_dtype))
            if there != ((size,), np.dtype(dtype)):
                found.append(
                    f"{name} is {there[1]} {list(there[0])}; expected {dtype} [{size}]"
                )
            elif digest(array) != sha256:
                found.append(f"{name} is not what was written: its sha256 differs")
        except ERRORS as error:
            found.append(f"{name}: {one_line(error, 300)}")
    return found
