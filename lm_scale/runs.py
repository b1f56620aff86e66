# SPDX-License-Identifier: Apache-2.0
"""What stands in a run's folders: its text made into batches, its newest weights."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from lm_scale.checkpoint import Checkpoints, has_checkpoints
from lm_scale.config import RunConfig, read_run, to_dict
from lm_scale.data.corpus import documents
from lm_scale.data.loader import EvalBatches, TrainBatches
from lm_scale.data.prepare import prepare
from lm_scale.data.store import TokenStore
from lm_scale.data.tokenizer import (
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from lm_scale.errors import InputError, differences, flatten
from lm_scale.generate import check_prompt
from lm_scale.models import Model, build_model
from lm_scale.objectives import Vocabulary
from lm_scale.sharding import (
    FULLY_SHARDED,
    Params,
    abstract_params,
    check_divides,
    make_mesh,
    shards,
)

RECIPE = ("corpus", "tokenizer")  # the fields of DataConfig that make a tokenizer


def prepare_tokenizer(config: RunConfig, console: Console):
    """The tokenizer of the run: the one in the store, the one named, or a new one."""
    store = Path(config.store_dir)
    folder, note = store / "tokenizer", store / "tokenizer" / "recipe.json"
    settings = config.data.tokenizer
    recipe = json.loads(
        json.dumps({name: to_dict(getattr(config.data, name)) for name in RECIPE})
    )
    try:
        there = flatten(json.loads(note.read_text()))
    except (FileNotFoundError, ValueError, AttributeError):
        there = None  # never finished: made again
    if there is not None:
        found = differences(there, flatten(recipe))
        if not found:
            return load_tokenizer(folder)
        if (store / "train").exists():
            raise InputError(
                f"{folder} was made otherwise: {'; '.join(found)}. "
                f"Choose another `data.store`, or delete {store}."
            )
    if settings.path is not None:
        tokenizer = load_tokenizer(settings.path)
    else:
        texts = documents(config.data.corpus, "train")
        console.print(f"Training a tokenizer of {settings.vocab_size} tokens ...")
        with warnings.catch_warnings(record=True, action="always") as caught:
            length = config.model.positions
            tokenizer = train_tokenizer(texts, settings, max_length=length)
        for warning in caught:
            console.print(f"Note: {warning.message}", markup=False)
    tokenizer.save_pretrained(folder)
    note.write_text(json.dumps(recipe))  # last: the folder is whole
    return tokenizer


def prepare_data(config: RunConfig, console: Console):
    """Makes what is missing of tokenizer and token stores; returns the tokenizer.

    Raises InputError if the tokenizer does not fit the model or the objective.
    """
    tokenizer = prepare_tokenizer(config, console)
    size = vocabulary_size(tokenizer)
    if size > config.model.vocab:
        raise InputError(
            f"The tokenizer has {size} tokens, the model's embedding "
            f"{config.model.vocab} rows. Set `model.vocab` to {size} or more."
        )
    pad_id = getattr(config.model, "pad_id", None)  # the causal families have none
    if pad_id is not None and pad_id != tokenizer.pad_token_id:
        raise InputError(
            f"model.pad_id = {pad_id}, but the tokenizer's padding token is "
            f"{tokenizer.pad_token_id}. Set `model.pad_id` to that."
        )
    if config.sample_prompt is not None:
        check_prompt(config.model, tokenizer, config.sample_prompt)
    config.objective.check(vocabulary_of(tokenizer))
    prepare(
        config.data.corpus, tokenizer, config.store_dir,
        separator=config.data.separator, console=console,
    )  # fmt: skip
    return tokenizer


def vocabulary_of(tokenizer) -> Vocabulary:
    """What the objectives have to know of a tokenizer."""
    special = tuple(sorted(tokenizer.all_special_ids))
    return Vocabulary(vocabulary_size(tokenizer), special, tokenizer.mask_token_id)


def open_batches(
    config: RunConfig, tokenizer, mesh: Mesh
) -> tuple[TrainBatches, EvalBatches]:
    """The training and the held-out batches of a run whose stores exist.

    A held-out batch is a part of a training batch, made larger where the mesh cannot
    cut that evenly: its size changes no result.
    """
    parts = shards(config.compute.rules, mesh, "batch")
    eval_batch = -(-config.batch // (config.accumulate * parts)) * parts
    options: dict[str, Any] = {
        "objective": config.objective,
        "vocabulary": vocabulary_of(tokenizer),
        "seq_len": config.seq_len,
        "batch": eval_batch,
        "seed": config.seed,
    }
    stores = Path(config.store_dir)
    held_out = EvalBatches(TokenStore.open(stores / "validation"), **options)
    options["batch"] = config.batch
    return TrainBatches(TokenStore.open(stores / "train"), **options), held_out


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
    try:
        mesh = make_mesh(config.mesh)
    except InputError:  # trained on another number of devices
        mesh = make_mesh(FULLY_SHARDED)
    model = build_model(config.model, config.compute)
    check_divides(model, config.compute.rules, mesh)
    if not has_checkpoints(run_dir):
        raise InputError(f"{run_dir} has no checkpoints yet. Train it first.")
    tokenizer = load_tokenizer(Path(config.store_dir) / "tokenizer")
    with Checkpoints(run_dir) as saved:
        target = abstract_params(model, config.compute.rules, mesh)
        params = saved.restore_params(target)
    return OpenRun(config, mesh, model, params, tokenizer)
