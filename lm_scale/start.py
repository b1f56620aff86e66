# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: its mesh, its model, and the newest weights there are."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from lm_scale import distributed
from lm_scale.checkpoint import Checkpoints
from lm_scale.config import RunConfig
from lm_scale.connect import check_devices, open_connections
from lm_scale.console import say
from lm_scale.data.loader import TrainBatches
from lm_scale.first_weights import check_init_from, read_weights
from lm_scale.metrics import check_reporters
from lm_scale.models import Model, build_model
from lm_scale.run_json import (
    announce,
    check_changes,
    resume_point,
    settings,
    write_config,
)
from lm_scale.sharding import check_divides, make_mesh
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
    config.check_mesh(mesh)
    attention, _ = config.choose_attention(mesh)
    compute = dataclasses.replace(config.compute, attention=attention)
    model = build_model(config.model, compute)
    check_divides(model, config.compute.rules, mesh)
    if config.init_from is not None:
        check_init_from(config)
    open_connections(mesh)
    return mesh, model


def first_state(
    config: RunConfig,
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    saved: Checkpoints,
    console: Console,
) -> TrainState:
    """The state to go on from. To be called under `jax.set_mesh`."""
    # In this order: this run's checkpoint, another run's, given weights, random ones.
    if saved.latest() is not None:
        state = saved.restore(abstract_state(model, optimizer, mesh))
        say(console, f"Going on from step {int(state.step)} in {saved.directory}")
        return state
    if config.resume_from is not None:
        folder, step = resume_point(config.resume_from)
        with Checkpoints(folder, tokens=saved.tokens) as other:
            state = other.restore(abstract_state(model, optimizer, mesh), step)
        say(console, f"Going on from step {int(state.step)} in {folder}")
        return state
    if config.init_from is not None:
        params = read_weights(config, model, mesh, console)
        return jax.jit(lambda p: start_state(model, optimizer, p))(params)
    return jax.jit(lambda: init_state(model, optimizer, config.seed))()


def keep_config(
    config: RunConfig,
    there: dict[str, Any] | None,
    step: int,
    tokens: dict[str, Any],
    console: Console,
) -> None:
    """Writes run.json; what has changed since the run had the config `there` is told.

    there: as `check_changes` takes it, who says what is refused; None: the run begins.
    step: where the state is. tokens: the fingerprint of the training tokens.
    """
    changes = None
    if there is not None:
        changes = check_changes(there, config, step, tokens)
        announce(changes, console)
    if distributed.index() == 0:
        write_config(config, step, changes)


def fingerprint(batches: TrainBatches) -> dict[str, str | int]:
    """What tells the tokens that a checkpoint was trained on from others."""
    manifest = batches.source.store.manifest
    return {"tokenizer": manifest.tokenizer_hash, "number": manifest.tokens}
