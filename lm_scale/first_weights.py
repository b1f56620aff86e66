# SPDX-License-Identifier: Apache-2.0
"""The weights that `init_from` names: where they are, if they fit, and reading them."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from lm_scale import distributed, hf
from lm_scale.checkpoint import restore_params
from lm_scale.checkpoint_folder import has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.console import say
from lm_scale.errors import InputError
from lm_scale.models import Model, ModelConfig
from lm_scale.run_json import checkpoints_of, read_run, resume_point
from lm_scale.sharding import Params, abstract_params
from lm_scale.warm_start import adapt, check_source, differences, source_model
from lm_scale.weight_files import check_weights


@dataclass(frozen=True)
class Source:
    """A checkpoint of a run of ours, or a Hugging Face model."""

    folder: Path  # of the run, or with config.json and weights
    step: int | None  # of the checkpoint; None: it is Hugging Face's
    model: ModelConfig

    def __str__(self) -> str:
        if self.step is None:
            return f"the Hugging Face model in {self.folder}"
        return f"the checkpoint of step {self.step} in {self.folder}"


def find_source(config: RunConfig) -> Source:
    """What `init_from` names.

    RUN_DIR/checkpoints/STEP is that checkpoint. A folder with run.json and checkpoints
    is a run, of which the newest is taken: a model that the run has exported there is
    as old or older. Every other folder is Hugging Face's, and every other name one of
    its hub. Raises InputError if there is no such thing.
    """
    folder, step = resume_point(str(config.init_from))
    steps = checkpoints_of(folder).steps() if (folder / "run.json").exists() else []
    if step is None and not steps:
        folder = hf.fetch(str(config.init_from), cache_dir=config.data.cache_dir)
        return Source(folder, None, hf.read_config(folder))
    if step is not None and step not in steps:
        raise InputError(
            f"init_from = {config.init_from!r}: there is no such checkpoint of a run. "
            f"In {folder} there are: {', '.join(map(str, steps)) or 'none'}."
        )
    return Source(folder, max(steps) if step is None else step, read_run(folder).model)


def check_init_from(config: RunConfig) -> None:
    """InputError naming the fields in which the first weights' model is another."""
    try:
        source = find_source(config)
    except InputError:
        if has_checkpoints(config.checkpoints):
            return  # the run goes on without them, and they may be gone by now
        raise
    check_source(source.model, config.model, config.init, source.folder)
    if source.step is None:
        check_weights(source.folder)


def read_weights(
    config: RunConfig, model: Model, mesh: Mesh, console: Console
) -> Params:
    """The parameters of `init_from`, on the mesh, made into the model's.

    To be called under `jax.set_mesh`. Raises InputError as `check_init_from`.
    """
    source, init = find_source(config), config.init
    check_source(source.model, config.model, init, source.folder)
    changes = differences(source.model, config.model, init)
    said = f": {'; '.join(changes)}" if changes else ""
    say(console, f"The first weights are {source}{said}")
    read_as = source_model(source.model, model, init)
    if source.step is None:
        params = hf.read_params(source.folder, read_as, mesh)
    else:
        step = distributed.from_first(source.step)  # a newer one may have come since
        target = abstract_params(read_as, read_as.compute.rules, mesh)
        params = restore_params(checkpoints_of(source.folder), target, step)
    if not changes:
        return params
    return jax.jit(lambda given: adapt(given, model, init, config.seed))(params)
