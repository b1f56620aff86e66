# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: its mesh, its model, and the newest weights there are."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from lm_scale import distributed
from lm_scale.assemble import declare_model
from lm_scale.checkpoint import NoneGood, restore_newest, restore_step
from lm_scale.checkpoint_folder import CheckpointFolder
from lm_scale.config import RunConfig
from lm_scale.connect import check_devices, open_connections
from lm_scale.console import say
from lm_scale.data.loader import TrainBatches
from lm_scale.data.mixed import stores_of
from lm_scale.data.streamed import StreamedBatches
from lm_scale.errors import InputError
from lm_scale.first_weights import check_init_from, read_weights
from lm_scale.manifest import Manifest
from lm_scale.metrics import check_reporters
from lm_scale.models import Model
from lm_scale.run_json import (
    announce,
    check_changes,
    checkpoints_of,
    noted,
    resume_point,
    settings,
    write_config,
)
from lm_scale.sharding import make_mesh
from lm_scale.step import TrainState, abstract_state, init_state, start_state


def set_up(config: RunConfig) -> tuple[Mesh, Model]:
    """The mesh and the declared model; no weights yet.

    Raises InputError for all that can be found wrong without a look at the text, and
    if not all processes have this config and the same devices.
    """
    config.check()
    check_devices(settings(config))
    check_reporters(config.report_to)
    mesh = make_mesh(config.mesh)
    model = declare_model(config, mesh)
    if config.init_from is not None:
        check_init_from(config)
    open_connections(mesh)
    return mesh, model


def first_state(
    config: RunConfig,
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    folder: CheckpointFolder,
    console: Console,
) -> tuple[TrainState, Manifest | None]:
    """The state to go on from, with its manifest; None: that of a first step.

    In this order: this run's checkpoint (in `folder`), another run's, given weights,
    random ones. To be called under `jax.set_mesh`.
    """
    target = abstract_state(model, optimizer, mesh)

    def tell(text: str) -> None:
        say(console, text)

    try:
        found = restore_newest(folder, target, tell)
    except NoneGood:
        if config.resume != "fresh":
            raise
        found = None
    if found is None:
        check_may_begin(config)
    if found is None and config.resume_from is not None:
        source, step = resume_point(config.resume_from)
        folder = checkpoints_of(source)
        found = restore_step(folder, target, step)
    if found is not None:
        say(console, f"Going on from step {found[1].step} in {folder}")
        return found
    if config.init_from is not None:
        params = read_weights(config, model, mesh, console)
        return jax.jit(lambda p: start_state(model, optimizer, p))(params), None
    return jax.jit(lambda: init_state(model, optimizer, config.seed))(), None


def check_may_begin(config: RunConfig) -> None:
    """InputError if the run was to go on, but has no checkpoint to go on from."""
    if config.resume == "must" and config.resume_from is None:
        raise InputError(
            f"resume = 'must', but there is no checkpoint in {config.checkpoints}. "
            f"Give the folder that has them, or leave `resume` out to start anew."
        )
    if config.resume == "fresh":
        return
    aside = CheckpointFolder(config.checkpoints).aside()
    saved = noted(config.run_dir).get("step")
    saved, aside = distributed.from_first((saved, aside))
    if saved is not None or aside:
        had = f"has saved step {saved}" if saved is not None else "had checkpoints"
        there = f" (but {', '.join(aside)})" if aside else ""
        raise InputError(
            f"The run in {config.run_dir} {had}, but there is no checkpoint in "
            f"{config.checkpoints}{there}. Put it back, or start anew with "
            f"--resume fresh or another `run_dir`."
        )


def keep_config(
    config: RunConfig,
    found: Manifest | None,
    tokens: dict[str, Any],
    console: Console,
) -> None:
    """Writes run.json; tells what has changed since the checkpoint that was found.

    tokens: the fingerprint of the training tokens. InputError for what may not change.
    """
    step, changes = 0, None
    if found is not None:
        step, there = found.step, {**found.config, "tokens": found.tokens}
        changes = check_changes(there, config, step, tokens)
        announce(changes, console)
    if distributed.index() == 0:
        write_config(config, step, changes)


def fingerprint(batches: TrainBatches | StreamedBatches) -> dict[str, str | int]:
    """What tells the tokens that a checkpoint was trained on from others.

    Of a mixture: `NAME.number`, `NAME.sha256` and `NAME.share` for each source.
    """
    if isinstance(batches, StreamedBatches):
        return batches.tokens
    found: dict[str, str | int] = {}
    for name, (store, share) in stores_of(batches.source).items():
        manifest, prefix = store.manifest, f"{name}." if name else ""
        found["tokenizer"] = manifest.tokenizer_hash
        found[f"{prefix}number"] = manifest.tokens
        found[f"{prefix}sha256"] = manifest.sha256
        if name:
            found[f"{prefix}share"] = f"{share:.9g}"
    return found
