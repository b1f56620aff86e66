# SPDX-License-Identifier: Apache-2.0
"""A run that has been trained: its newest weights, and what they are worth."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm_scale.checkpoint import restore_params
from lm_scale.checkpoint_folder import CheckpointFolder, has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.connect import check_devices, open_connections
from lm_scale.data.tokenizer import load_tokenizer
from lm_scale.errors import InputError
from lm_scale.evaluate import evaluate
from lm_scale.models import Model, build_model
from lm_scale.run_json import read_run, settings
from lm_scale.run_text import open_eval
from lm_scale.sharding import (
    FULLY_SHARDED,
    Params,
    abstract_params,
    check_divides,
    make_mesh,
)
from lm_scale.step import make_eval_step


@dataclass(frozen=True)
class OpenRun:
    """A run's newest parameters, ready to be used under `jax.set_mesh(mesh)`."""

    config: RunConfig
    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any


def open_run(run_dir: str) -> OpenRun:
    """Loads a run onto the devices there are, in its own mesh if that fits them."""
    config = read_run(run_dir)
    check_devices(settings(config))
    # What a run was told to use may not run here; and its model is for any use.
    compute = dataclasses.replace(config.compute, attention="auto", quantize=None)
    config = dataclasses.replace(config, compute=compute)
    mesh = some_mesh(config)
    attention, _ = config.choose_attention(mesh)
    compute = dataclasses.replace(compute, attention=attention)
    model = build_model(config.model, compute)
    check_divides(model, config.compute.rules, mesh)
    if not has_checkpoints(config.checkpoints):
        raise InputError(f"{run_dir} has no checkpoints yet. Train it first.")
    open_connections(mesh)
    tokenizer = load_tokenizer(Path(config.store_dir) / "tokenizer")
    target = abstract_params(model, config.compute.rules, mesh)
    params = restore_params(CheckpointFolder(config.checkpoints), target)
    return OpenRun(config, mesh, model, params, tokenizer)


def some_mesh(config: RunConfig) -> Mesh:
    """The run's mesh if it fits the devices there are, else one that does."""
    try:
        return make_mesh(config.mesh)
    except InputError:  # trained on another number of devices
        return make_mesh(FULLY_SHARDED)


def held_out_loss(run: OpenRun) -> dict[str, float]:
    """What `evaluate` says of the run's parameters on its held-out text."""
    held_out = open_eval(run.config, run.tokenizer, run.mesh)
    with jax.set_mesh(run.mesh):
        return evaluate(
            make_eval_step(run.model), run.params, held_out, run.mesh,
            run.config.compute.rules,
        )  # fmt: skip
