# SPDX-License-Identifier: Apache-2.0
"""`lm-scale checkpoint list|verify|show`: what is in a folder of checkpoints."""

import json

import jax
from etils import epath
from rich.console import Console
from rich.table import Column, Table

from lm_scale import manifest
from lm_scale.checkpoint import open_array
from lm_scale.checkpoint_folder import CheckpointFolder
from lm_scale.console import say
from lm_scale.errors import InputError, one_line
from lm_scale.hashing import block_hash
from lm_scale.manifest import Manifest, name_of

_hash = jax.jit(block_hash, static_argnums=2)


def find(where: str) -> tuple[CheckpointFolder, int | None]:
    """The folder of a run, of its checkpoints, or of one of them (then its step).

    Raises InputError if there is nothing of the kind.
    """
    path, step = epath.Path(where), None
    if (path / "run.json").exists():
        from lm_scale.run_json import read_run

        path = epath.Path(read_run(where).checkpoints)
    elif path.name.isdigit() and (path / manifest.NAME).exists():
        path, step = path.parent, int(path.name)
    folder = CheckpointFolder(path)
    if not folder.steps():
        raise InputError(
            f"{where} has no checkpoints: expected the folder of a run, of its "
            f"checkpoints, or of one of them."
        )
    return folder, step


def list_(where: str, console: Console) -> int:
    """Prints a line for each checkpoint; 1 if one of them is damaged."""
    folder, _ = find(where)
    table = Table(
        Column("step", justify="right"), Column("saved (UTC)", no_wrap=True),
        Column("bytes", justify="right"), Column("held-out loss", justify="right"),
        "state", box=None,
    )  # fmt: skip
    status = 0
    for step in folder.steps():
        try:
            found = folder.manifest(step)
            manifest.check_files(found, folder / step)
        except ValueError as error:
            status = 1
            table.add_row(str(step), "", "", "", f"cannot be used: {error}")
            continue
        loss = "" if found.eval_loss is None else f"{found.eval_loss:.4f}"
        size = sum(size for size, _ in found.files.values())
        table.add_row(str(step), found.time[:19], f"{size:,}", loss, "whole")
    console.print(table)
    say(console, "`lm-scale checkpoint verify` reads the data too.")
    return status


def verify(where: str, step: int | None, console: Console) -> int:
    """Reads all data of a step, or of every one, shard by shard; 1 if any is wrong."""
    folder, found = find(where)
    step = found if step is None else step
    status = 0
    for number in folder.steps() if step is None else [step]:
        problem = problem_of(folder, number)
        status = status if problem is None else 1
        say(console, f"step {number}: {problem or 'good'}")
    return status


def problem_of(folder: CheckpointFolder, step: int) -> str | None:
    """What is wrong with a checkpoint; holds one shard in memory at a time."""
    try:
        found = folder.manifest(step)
        manifest.check_files(found, folder / step)
        for path, facts in found.arrays.items():
            array = open_array(folder / step, path)
            for index, saved in facts.shards.items():
                region = tuple(slice(*part) for part in index)
                block = array[region].read().result()
                start = tuple(first for first, _ in index)
                if int(_hash(block, start, facts.shape)) != saved:
                    return (
                        f"the data of {path}[{name_of(index)}] are not what was saved"
                    )
    except ValueError as error:
        return one_line(error, 300)
    return None


def show(where: str, step: int | None, console: Console) -> int:
    """Prints what a checkpoint (None: the newest) holds, and the run's config."""
    folder, found = find(where)
    step = found if step is None else step
    step = folder.steps()[-1] if step is None else step
    try:
        facts = folder.manifest(step)
    except ValueError as error:
        raise InputError(f"{folder / step} cannot be used: {error}.") from None
    console.print(arrays_table(facts))
    say(console, json.dumps(facts.config, indent=2))
    lines = {
        "checkpoint": folder / step, "saved": facts.time,
        "held-out loss": facts.eval_loss, "tokens": facts.tokens,
        "batches left out": [list(window) for window in facts.left_out],
        "versions": facts.versions,
    }  # fmt: skip
    for name, value in lines.items():
        say(console, f"{name:16} {value}")
    return 0


def arrays_table(facts: Manifest) -> Table:
    """One row for each array: path, shape, type and number of shards."""
    table = Table(Column("array", no_wrap=True), "shape", "type", "shards", box=None)
    for path, array in facts.arrays.items():
        shape = "×".join(map(str, array.shape))
        table.add_row(path, shape, array.dtype, str(len(array.shards)))
    return table
