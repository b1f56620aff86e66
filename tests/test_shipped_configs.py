# SPDX-License-Identifier: Apache-2.0
"""Every config of `configs/`: it loads, and its step type-checks at full size."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lm_scale.config import load_config
from lm_scale.models import GPT2Config, RobertaConfig, build_model
from lm_scale.objectives import MaskedLM
from lm_scale.optim import AdamW, Schedule, make_optimizer, make_schedule
from lm_scale.sharding import make_mesh
from lm_scale.step import abstract_state, decay_mask, make_train_step

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_step_of_a_config_type_checks(path):
    """On 8 devices, as many as the configs are for; nothing is computed."""
    config = load_config(str(path), [], prog="test")
    config.check()
    mesh = make_mesh(config.mesh)
    config.check_mesh(mesh)
    model = build_model(config.model, config.compute)
    schedule = make_schedule(config.schedule, 10_000)
    optimizer = make_optimizer(config.optimizer, schedule, decay_mask(model))
    step = make_train_step(model, optimizer, schedule, seed=0)
    state = abstract_state(model, optimizer, mesh)
    sharding = NamedSharding(mesh, config.compute.rules.spec("batch", "seq"))
    shape = (config.batch, config.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    with jax.set_mesh(mesh):
        after, metrics = jax.eval_shape(
            step, state, {"tokens": tokens, "labels": tokens}
        )
    assert metrics["loss"].shape == ()
    assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(
        jnp.shape, state.params
    )


# The published commands of the old README, seed-scripts.md section 4.
PUBLISHED = {
    "roberta_base_norwegian": {
        "model": RobertaConfig(), "objective": MaskedLM(0.15, 0.8, 0.1),
        "schedule": Schedule(3e-4, 1000, "linear", 0.0),
        "seq_len": 128, "batch": 128 * 8, "epochs": 18,
    },
    "gpt2_norwegian": {
        "model": GPT2Config(
            embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0
        ),
        "schedule": Schedule(5e-3, 1000, "linear", 0.0),
        "seq_len": 512, "batch": 64 * 8, "epochs": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_have_the_published_hyper_parameters(name):
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_config(str(path), [], prog="test")
    assert config.optimizer == AdamW(0.9, 0.98, 1e-8, 0.01, None)
    assert (config.log_every, config.eval_every, config.save_every) == (500, 2500, 2500)
    assert config.data.tokenizer.min_frequency == 2
    assert config.data.tokenizer.vocab_size == config.model.vocab
    for field, value in PUBLISHED[name].items():
        assert getattr(config, field) == value, field
