# SPDX-License-Identifier: Apache-2.0
"""Every config of `configs/`: it loads, its step type-checks at full size, it fits."""

import ast
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from lm_scale.assemble import make_parts
from lm_scale.config import RunConfig, load_config
from lm_scale.errors import InputError
from lm_scale.models import GPT2Config, Model, RobertaConfig, build_model
from lm_scale.objectives import MaskedLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.planning.accelerators import find_slice
from lm_scale.shapes import parameter_count
from lm_scale.sharding import PRESETS, abstract_mesh, check_divides, sharding_table
from lm_scale.step import abstract_state

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
SLICE = re.compile(r"^Hardware  TPU (v\w+-\d+) \((\d+) (?:cores|chips)\)", re.MULTILINE)


# --- The slices -----------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A JAX device of a TPU: as much of it as the choice of a kernel looks at."""

    device_kind: str
    counted: int  # what the number in a slice's name counts of it: its TensorCores
    hbm: int  # GiB
    platform: str = "tpu"


# cloud.google.com/tpu/docs/<generation>. A device is a core (v2, v3), or a chip: of two
# cores, which the name counts (v4, v5p), or of one (v5e, v6e).
TPUS = {
    "v2": Device("TPU v2", counted=1, hbm=8),
    "v3": Device("TPU v3", counted=1, hbm=16),
    "v4": Device("TPU v4", counted=2, hbm=32),
    "v5e": Device("TPU v5 lite", counted=1, hbm=16),
    "v5p": Device("TPU v5", counted=2, hbm=95),
    "v6e": Device("TPU v6 lite", counted=1, hbm=32),
}


def slice_of(name: str) -> tuple[Device, int]:
    """The device of a slice such as v5p-512, and the number of them."""
    generation, number = name.split("-")
    device = TPUS[generation]
    count, rest = divmod(int(number), device.counted)
    if rest:
        raise ValueError(f"{name}: a {generation} has two cores a chip")
    return device, count


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v3-8", 8), ("v4-128", 64), ("v5e-16", 16), ("v5p-512", 256), ("v6e-64", 64)],
)
def test_a_slice_has_so_many_devices(name, devices):
    assert slice_of(name)[1] == devices


def test_a_slice_of_half_a_chip_is_a_mistake():
    with pytest.raises(ValueError, match="v5p-33: .* two cores a chip"):
        slice_of("v5p-33")


def hardware_of(path: Path) -> tuple[Device, int]:
    """What the docstring names: a slice, or any eight devices."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    if re.search(r"^Hardware  any; a CPU is simulated as 8 devices", text, re.M):
        return Device("cpu", counted=1, hbm=1, platform="cpu"), 8
    named = SLICE.search(text)
    assert named, f"{path.name} names no slice on a line of the form {SLICE.pattern}"
    device, count = slice_of(named[1])
    assert int(named[2]) == count, f"{path.name}: {named[0]}"
    return device, count


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_names_the_slice_of_its_docstring(path):
    """For `lm-scale plan`, which is to count as many devices of it."""
    config = load_config(str(path), [], prog="test")
    device, count = hardware_of(path)
    if device.platform == "cpu":
        assert config.slice is None
        return
    assert config.slice is not None
    chosen = find_slice(config.slice)
    assert (chosen.generation.kind, chosen.devices) == (device.device_kind, count)


# --- What the programs of a run are traced with ---------------------------------------


def load(path: Path, *overrides: str) -> tuple[RunConfig, AbstractMesh, Model]:
    """A config on its slice, checked as `set_up` does it."""
    config = load_config(str(path), list(overrides), prog="test")
    config.check()
    device, count = hardware_of(path)
    mesh = abstract_mesh(config.mesh, count)
    config.check_mesh(mesh)
    of_devices = Mesh(np.full(mesh.axis_sizes, device, object), mesh.axis_names)
    kernel, _ = config.choose_attention(of_devices)
    model = build_model(config.model, replace(config.compute, attention=kernel))
    check_divides(model, config.compute.rules, mesh)
    return config, mesh, model


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)


def path_of(name: str) -> Path:
    return next(path for path in CONFIGS if path.stem == name)


all_configs = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@all_configs
def test_the_step_of_a_config_type_checks(path):
    """On the slice that it names, backward and update included; nothing is computed.

    Weights and optimizer come out as they went in: else step 2 is another program.
    """
    config, mesh, model = load(path)
    parts = make_parts(config, model, 10_000)
    state = abstract_state(model, parts.optimizer, mesh)
    sharding = NamedSharding(mesh, config.compute.rules.spec("batch", "seq"))
    shape = (config.batch, config.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    with jax.sharding.use_abstract_mesh(mesh):
        after, metrics = jax.eval_shape(
            parts.step, state, {"tokens": tokens, "labels": tokens}
        )
    assert metrics["loss"].shape == ()
    assert types(after.params) == types(state.params)
    # Adam's two moments; its counters are scalars without a sharding.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert types([x for x in jax.tree.leaves(after.opt_state) if x.ndim]) == types(
        moments
    )
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("llama3_70b", "--mesh.tensor 3", r"fsdp=-1, tensor=3\) does not fit 256 dev"),
        (
            "llama3_70b",
            "--mesh.tensor 64",
            r"`blocks.kv` .* `kv_heads` dimension of 8 cannot be cut into 64 parts",
        ),
        ("llama3_8b", "--mesh.tensor 2", "tensor = 2, but the rules cut no activation"),
        ("llama3_8b", "--batch 500", "batch = 500 .* Use a multiple of"),
        ("llama_160m", "--mesh.data 16", r"data=16\) does not fit 8 device"),
    ],
)
def test_a_mesh_that_a_config_cannot_have_is_refused(name, overrides, said):
    with pytest.raises(InputError, match=said):
        load(path_of(name), *overrides.split())


def bytes_held(config: RunConfig, mesh: AbstractMesh, model: Model) -> int:
    """Of a device, between two steps: weights and the optimizer's state."""
    optimizer = make_parts(config, model, 10_000).optimizer
    state = abstract_state(model, optimizer, mesh).opt_state
    shards = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    ]
    rows = sharding_table(model, config.compute.rules, mesh)
    return sum(shards) + sum(row.bytes_per_device for row in rows)


@all_configs
def test_weights_and_optimizer_of_a_config_fit_its_devices(path):
    """No proof that the step does: its docstring tells what the compiler said."""
    device, _ = hardware_of(path)
    config, mesh, model = load(path)
    all_of_it = 12 * parameter_count(config.model)  # weight and Adam's moments, f32
    held = bytes_held(config, mesh, model)
    assert all_of_it / mesh.size <= held < device.hbm * 2**30


def test_weights_that_are_not_cut_do_not_fit():
    """The 70 B on the devices of its slice, each with all of them: 788 GiB."""
    path = path_of("llama3_70b")
    config, mesh, model = load(path)
    compute = replace(config.compute, rules=PRESETS["dp"])
    whole = bytes_held(
        replace(config, compute=compute), mesh, build_model(config.model, compute)
    )
    assert whole // 2**30 == 788
    assert whole > hardware_of(path)[0].hbm * 2**30


# --- Numbers that others have published -----------------------------------------------

# What the config.json of each says, where they differ and where they are alike.
LLAMA3 = {
    "attention_bias": False, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "vocab_size": 128256,
}  # fmt: skip
FREQUENCIES = {
    "rope_theta": 500000.0, "rope_type": "llama3", "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
META = {
    "llama_1b": {  # Llama-3.2-1B
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "intermediate_size": 8192, "tie_word_embeddings": True,
        "rope_parameters": {**FREQUENCIES, "factor": 32.0},
    },
    "llama3_8b": {  # Llama-3.1-8B
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "head_dim": 128, "intermediate_size": 14336, "tie_word_embeddings": False,
        "rope_parameters": {**FREQUENCIES, "factor": 8.0},
    },
    "llama3_70b": {  # Llama-3.1-70B
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "head_dim": 128, "intermediate_size": 28672, "tie_word_embeddings": False,
        "rope_parameters": {**FREQUENCIES, "factor": 8.0},
    },
}  # fmt: skip
PARAMETERS = {
    "llama_160m": 160_451_328,
    "llama_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", META)
def test_the_llamas_have_the_shapes_of_meta(name):
    model = load_config(str(path_of(name)), [], prog="test").model
    found = model.to_hf()
    for key, value in {**LLAMA3, **META[name]}.items():
        assert found[key] == value, key


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_llamas_have_so_many_weights(name):
    model = load_config(str(path_of(name)), [], prog="test").model
    assert parameter_count(model) == PARAMETERS[name]


# The published commands of the old README, seed-scripts.md section 4.
PUBLISHED = {
    "roberta_base_norwegian": {
        "model": RobertaConfig(),
        # As many masks a row, and not on average: for the speed.
        "objective": MaskedLM(0.15, 0.8, 0.1, fixed_count=True),
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
    config = load_config(str(path_of(name)), [], prog="test")
    assert config.optimizer == AdamW(0.9, 0.98, 1e-8, 0.01, None)
    assert (config.log_every, config.eval_every, config.save_every) == (500, 2500, 2500)
    assert config.data.tokenizer.min_frequency == 2
    assert config.data.tokenizer.vocab_size == config.model.vocab
    for field, value in PUBLISHED[name].items():
        assert getattr(config, field) == value, field
