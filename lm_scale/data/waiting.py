# SPDX-License-Identifier: Apache-2.0
"""Waiting for what other ranks write into the shared folder."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lm_scale.console import say
from lm_scale.data.places import read_many
from lm_scale.errors import StorageError

PATIENCE = 3600.0  # s in which nothing new has come, after which somebody is dead
_PAUSE = 1.0  # s between two looks


def wait_for(
    path: str | Path, names: Sequence[str], what: str, console: Console
) -> list[bytes]:
    """The contents of files of a folder, once all of them are there.

    what: for the line that is said if some are not.

    Raises:
      StorageError: nothing new has come for `PATIENCE` seconds.
    """
    found = read_many(path, names)
    if None in found:
        say(console, f"waiting for {what}, which other ranks make ...")
    since = time.monotonic()
    while None in found:
        time.sleep(_PAUSE)
        missing = [i for i, content in enumerate(found) if content is None]
        for i, content in zip(
            missing, read_many(path, [names[i] for i in missing]), strict=True
        ):
            if content is not None:
                found[i], since = content, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise StorageError(
                f"{len(missing)} of {len(names)} files are not there, {path}/"
                f"{names[missing[0]]} for one, and none has come for {PATIENCE:.0f} s: "
                f"has a rank ended that was to make {what}? What is finished stays: "
                "run it again, and this one."
            )
    return [content for content in found if content is not None]
