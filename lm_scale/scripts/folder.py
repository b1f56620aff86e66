# SPDX-License-Identifier: Apache-2.0
"""The output folder: going on with what is there, or starting anew beside it.

Nothing in it is deleted. `--overwrite_output_dir` moves a former run's files to
`previous-N`, and keeps there what the new run will write over.
"""

import filecmp
import os
import shutil
from pathlib import Path

from rich.console import Console

from lm_scale.checkpoint_folder import has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.console import say
from lm_scale.data.sources import local_files
from lm_scale.data.tokenizer import TOKENIZER_FILES
from lm_scale.errors import InputError
from lm_scale.run_json import read_run
from lm_scale.scripts.flags import TrainingArguments

# What only a run of ours writes, and a new one must not find.
MOVED = (
    "checkpoints", "saved.json", "metrics.jsonl", "events.out.tfevents.*",
    "eval_results.json", "wandb", "wandb_id",
)  # fmt: skip
# What a new run writes over, whoever made it. It stays, too: `output_dir` may be the
# folder that model, config and tokenizer are read from.
KEPT = (
    "run.json", "config.json", "generation_config.json", *TOKENIZER_FILES,
    "model*.safetensors*",
)  # fmt: skip

# The fields of `config.data` that make the tokens, with `seq_len`.
TOKENS = (
    "corpus", "tokenizer", "separator", "examples", "max_train_examples",
    "max_eval_examples",
)  # fmt: skip


def ready(config: RunConfig, flags: TrainingArguments, console: Console) -> None:
    """Makes the folder ready for `train`; InputError if it may not be used."""
    folder = Path(config.run_dir)
    asked = (flags.resume_from_checkpoint or "").lower()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: expected a folder.")
    if flags.overwrite_output_dir:
        if asked == "true":
            raise InputError(
                "--overwrite_output_dir starts anew and --resume_from_checkpoint true "
                "goes on: give one of them."
            )
        set_aside(config, console)
        return
    if asked == "true" and not has_checkpoints(folder / "checkpoints"):
        raise InputError(
            f"--resume_from_checkpoint true: {folder} has no checkpoints of lm_scale."
        )
    if asked == "false" and has_checkpoints(folder / "checkpoints"):
        raise InputError(
            f"--resume_from_checkpoint false: {folder} holds a run already. Give "
            f"another --output_dir, or --overwrite_output_dir to start anew there."
        )
    if any(path.is_file() for path in folder.rglob("*")) and not is_ours(folder):
        raise InputError(
            f"--output_dir {folder} is not empty and holds no run of lm_scale. Give "
            f"another one, or --overwrite_output_dir to use it all the same."
        )


def check_results(config: RunConfig) -> None:
    """InputError if an evaluation alone would write over somebody else's results."""
    folder = Path(config.run_dir)
    if (folder / "eval_results.json").exists() and not is_ours(folder):
        raise InputError(
            f"--output_dir {folder} holds eval_results.json, but no run of lm_scale. "
            f"Give another one."
        )


def is_ours(folder: Path) -> bool:
    """If a run of ours was started there, perhaps without getting far."""
    return is_run(folder) or (folder / "data/tokenizer/recipe.json").exists()


def is_run(folder: Path) -> bool:
    try:
        read_run(folder)
    except InputError:
        return False
    return True


def set_aside(config: RunConfig, console: Console) -> None:
    """Makes room for a new run; what was there is in the first free `previous-N`."""
    folder = Path(config.run_dir)
    moved = []
    if is_run(folder):
        moved = [path for pattern in MOVED for path in sorted(folder.glob(pattern))]
    elif has_checkpoints(folder / "checkpoints"):
        raise InputError(
            f"{folder}/checkpoints holds checkpoints, but {folder}/run.json does not "
            f"say of which run. Move them away, or give another --output_dir."
        )
    tokens = folder / "data"
    if (tokens / "tokenizer/recipe.json").exists() and not fresh(folder, config):
        moved.append(tokens)
    kept = [path for pattern in KEPT for path in sorted(folder.glob(pattern))]
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    last, aside = folder / f"previous-{number - 1}", folder / f"previous-{number}"
    if not moved and all(same(path, last / path.name) for path in kept):
        return  # started before, and did not get far enough to change anything
    aside.mkdir()
    for path in kept:
        keep(path, aside / path.name)
    for path in moved:
        path.rename(aside / path.name)
    say(
        console,
        f"Starting anew: what was in {folder} is now in {aside}. To go on with a run, "
        f"leave --overwrite_output_dir out.",
    )


def same(path: Path, other: Path) -> bool:
    return other.exists() and filecmp.cmp(path, other, shallow=True)


def keep(path: Path, copy: Path) -> None:
    """A copy, of weights without their bytes: an export replaces the file's name."""
    if path.suffix == ".safetensors":
        try:
            os.link(path, copy)
            return
        except OSError:  # a file system without links
            pass
    shutil.copy2(path, copy)


def fresh(folder: Path, config: RunConfig) -> bool:
    """If the folder's tokens are those that this run would make."""
    try:
        former = read_run(folder)
    except InputError:
        return False
    for name in TOKENS:
        if getattr(former.data, name) != getattr(config.data, name):
            return False
    if former.seq_len != config.seq_len:
        return False
    made = (folder / "data/tokenizer/recipe.json").stat().st_mtime
    corpus, tokenizer = config.data.corpus, config.data.tokenizer
    sources = [
        *local_files(corpus.source, corpus.subset),
        *local_files(corpus.validation_source or ""),
    ]
    if tokenizer.path is not None:
        sources += [Path(tokenizer.path).expanduser() / "tokenizer.json"]
    return all(path.stat().st_mtime <= made for path in sources if path.exists())
