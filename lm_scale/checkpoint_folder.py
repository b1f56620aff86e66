# SPDX-License-Identifier: Apache-2.0
"""The folder that holds a run's checkpoints: which there are, and which may go.

`<folder>/<step>/` is a checkpoint if it has a manifest; all else is left alone. What is
found damaged is renamed, never deleted: `<step>.damaged`. The folder is local or in an
object store (`gs://bucket/path`).
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from lm_scale import manifest
from lm_scale.errors import InputError
from lm_scale.manifest import Manifest, is_link, is_local

# What orbax leaves of a save that was cut off, and we of a deletion.
LEFTOVER = re.compile(r"[0-9]+\.(orbax-checkpoint-tmp.*|deleting)")
# What was set aside: damaged, or of steps that were rolled back.
ASIDE = re.compile(r"[0-9]+\.(damaged|rolled-back).*")
STEP = re.compile(r"0|[1-9][0-9]*")


class CheckpointFolder:
    """The checkpoints in a folder, by step. Makes nothing until it is written to."""

    def __init__(self, folder: str | Path | epath.Path):
        path = epath.Path(folder)
        if not is_local(path) and importlib.util.find_spec("gcsfs") is None:
            raise InputError(
                f"{folder} is in an object store, for which gcsfs is missing: "
                f"pip install 'lm_scale[gcs]'."
            )
        self.path = path.resolve() if is_local(path) else path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, step: int) -> epath.Path:
        return self.path / str(step)

    def steps(self) -> list[int]:
        """The steps of all folders that have the name of one, in order; no links."""
        return sorted(
            int(path.name)
            for path in self._entries()
            if STEP.fullmatch(path.name) and path.is_dir() and not is_link(path)
        )

    def aside(self) -> list[str]:
        """The names of the checkpoints that were set aside."""
        return sorted(p.name for p in self._entries() if ASIDE.fullmatch(p.name))

    def manifest(self, step: int) -> Manifest:
        """ValueError saying why the folder of that step is no checkpoint."""
        found = manifest.read(self / step)
        if found.step != step:
            raise ValueError(f"it holds step {found.step}: it was renamed")
        return found

    def manifests(self) -> dict[int, Manifest]:
        """Those that can be read, by step."""
        found = {}
        for step in self.steps():
            try:
                found[step] = self.manifest(step)
            except ValueError:
                continue
        return found

    def set_aside(self, step: int, why: str) -> epath.Path:
        """Renames whatever has that step's name to `<step>.<why>`; returns the path."""
        number, target = 1, self.path / f"{step}.{why}"
        while target.exists():
            number += 1
            target = self.path / f"{step}.{why}-{number}"
        (self / step).rename(target)
        return target

    def delete(self, step: int) -> None:
        """Removes a checkpoint; cut off at any moment, none is left half there."""
        path = self / step
        if is_local(path):
            path = path.rename(self.path / f"{step}.deleting")
        else:  # a rename would copy it
            (path / manifest.NAME).unlink()
        path.rmtree()

    def clean(self) -> None:
        """Removes what saves and deletions of a killed process have left.

        For the process that holds the lock: another one may be at work there.
        """
        for path in self._entries():
            if LEFTOVER.fullmatch(path.name) and path.is_dir() and not is_link(path):
                path.rmtree()

    def make_way(self, step: int) -> None:
        """Sets aside what has the name of a checkpoint that is to be written."""
        if (self / step).exists() or is_link(self / step):
            self.set_aside(step, "foreign")

    def being_written(self, step: int) -> epath.Path:
        """Where the checkpoint of that step is until it has its name."""
        unnamed = self.path / f"{step}.orbax-checkpoint-tmp"
        return unnamed if unnamed.exists() else self / step

    def _entries(self) -> list[epath.Path]:
        try:
            return list(self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def to_delete(
    saved: dict[int, float | None],
    *,
    keep: int | None,
    keep_every: int | None,
    keep_best: bool,
) -> Sequence[int]:
    """Which of these steps may go; `saved` has their held-out losses, if known.

    keep: so many of the newest stay; None: all. keep_every: so do the multiples of it.
    keep_best: so does the one with the lowest loss.
    """
    steps = sorted(saved)
    stay = set(steps if keep is None else steps[-keep:])
    if keep_every is not None:
        stay |= {step for step in steps if step % keep_every == 0}
    losses: dict[Any, float] = {s: x for s, x in saved.items() if x is not None}
    if keep_best and losses:
        stay.add(min(losses, key=lambda step: (losses[step], step)))
    return [step for step in steps if step not in stay]


def has_checkpoints(folder: str | Path | epath.Path) -> bool:
    """If a run has saved anything there; looks at the names only."""
    return bool(CheckpointFolder(folder).steps())
