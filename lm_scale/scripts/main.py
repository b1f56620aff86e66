# SPDX-License-Identifier: Apache-2.0
"""`lm-scale mlm` and `lm-scale clm`: training runs by the old scripts' flags."""

import os
import shutil
import sys
from pathlib import Path

from rich.console import Console

from lm_scale.checkpoint_folder import CheckpointFolder, has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.distributed import on_first
from lm_scale.errors import InputError
from lm_scale.lock import RunLock
from lm_scale.run_json import check_run_dir
from lm_scale.scripts.checks import only_evaluates
from lm_scale.scripts.flags import Flags, Kind, parse
from lm_scale.scripts.folder import check_results, ready
from lm_scale.scripts.messages import in_flags


def main(kind: Kind, argv: list[str], *, script: str | None = None) -> int:
    """Runs one command; returns the exit status (see `lm_scale.__main__`).

    script: path of the script that was started; flags in `<script>.args` beside it go
    before `argv`.
    """
    prog = f"lm-scale {kind}" if script is None else Path(script).name
    args_file = None if script is None else Path(script).with_suffix(".args")
    flags = parse(kind, argv, prog, args_file)
    hide(flags)
    if flags.model.token is not None:
        os.environ["HF_TOKEN"] = flags.model.token  # where the hub's library looks
    console = Console()
    try:
        return run(flags, console)
    except InputError as error:
        raise InputError(str(error) + in_flags(str(error), kind)) from error


def hide(flags: Flags) -> None:
    """Blots tokens out of sys.argv, which loggers such as wandb keep and send."""
    for token in (flags.model.token, flags.training.hub_token):
        if token:
            sys.argv[:] = [word.replace(token, "<token>") for word in sys.argv]


def run(flags: Flags, console: Console) -> int:
    """Translates the flags, and trains or evaluates."""
    from transformers import logging

    from lm_scale.scripts.translate import run_config
    from lm_scale.start import set_up
    from lm_scale.trainer import evaluate_only, train

    logging.set_verbosity_error()  # its warnings are of its own models
    config, training = run_config(flags, console), flags.training
    mesh_and_model = set_up(config)  # what is wrong is found before anything is moved
    if only_evaluates(training):
        check_results(config)
        on_first(lambda: renew(config, flags))
        evaluate_only(config, console, made=mesh_and_model)
        return 0

    def make_room() -> None:
        # Before anything is moved from under another one that trains there.
        RunLock(CheckpointFolder(config.run_dir).path, print).check()
        ready(config, training, console)
        check_run_dir(config)
        renew(config, flags)

    on_first(make_room)
    outcome = train(config, console, hub_token=training.hub_token, made=mesh_and_model)
    return 75 if outcome.interrupted else 0


def renew(config: RunConfig, flags: Flags) -> None:
    """With --overwrite_cache, deletes a former command's tokens: they are made anew."""
    if not flags.data.overwrite_cache:
        return
    if has_checkpoints(config.checkpoints):
        raise InputError(
            f"--overwrite_cache: the checkpoints in {config.run_dir} were trained on "
            f"these tokens. Leave it out, or start anew by --overwrite_output_dir."
        )
    for part in ("train", "validation"):
        folder = Path(config.store_dir) / part
        if (folder / "manifest.json").exists():  # ours
            shutil.rmtree(folder)
