# SPDX-License-Identifier: Apache-2.0
"""The equivalence matrix: three families, each trained a few steps on every mesh.

tests/test_matrix.py compares them. Run as a program, `python matrix.py FOLDER`, it
trains on the devices of several processes and keeps the results for the same test.
"""

import dataclasses
import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding

from lm_scale.models import (
    Compute,
    GPT2Config,
    LlamaConfig,
    ModelConfig,
    RobertaConfig,
    build_model,
)
from lm_scale.objectives import IGNORE
from lm_scale.optim import AdamW, Schedule, make_optimizer, make_schedule
from lm_scale.sharding import (
    PRESETS,
    MeshShape,
    Params,
    Rules,
    flatten,
    init_params,
    make_mesh,
)
from lm_scale.step import abstract_state, decay_mask, make_train_step

LAYERS, ROWS, LENGTH, VOCAB, STEPS = 2, 32, 16, 40, 10
SHAPE = {"vocab": VOCAB, "positions": LENGTH, "layers": LAYERS, "embed": 16,
         "heads": 8, "mlp": 24, "init_std": 0.2}  # fmt: skip
RATES = ("embed_dropout", "attention_dropout", "residual_dropout")
FAMILIES: dict[str, ModelConfig] = {
    "gpt2": GPT2Config(**SHAPE, **dict.fromkeys(RATES, 0.0)),
    "roberta": RobertaConfig(**SHAPE, dropout=0.0, attention_dropout=0.0),
    "llama": LlamaConfig(kind="qwen3", **SHAPE, kv_heads=2, qk_norm=True),
}


@dataclass(frozen=True)
class Layout:
    """A mesh, the rules, and what computes attention there."""

    mesh: MeshShape
    rules: Rules = PRESETS["fsdp_tp"]
    attention: str = "xla"


ONE = Layout(MeshShape(data=1))
LONG = PRESETS["context"]
# Where there are fewer key-value heads than parts, each has all of them.
FEW_KV = dataclasses.replace(PRESETS["fsdp_tp"], kv_heads=(), act_kv_heads=())
LAYOUTS = {
    "data=8": Layout(MeshShape(data=8), PRESETS["dp"]),
    "fsdp=8": Layout(MeshShape(1, fsdp=8), PRESETS["fsdp"]),
    "tensor=8": Layout(MeshShape(1, tensor=8), FEW_KV),
    "data=2 fsdp=2 tensor=2": Layout(MeshShape(2, fsdp=2, tensor=2)),
    "fsdp=4 context=2": Layout(MeshShape(1, fsdp=4, context=2), LONG, "ring"),
    "context=8": Layout(MeshShape(1, context=8), LONG, "ring"),
}
MORE_LAYOUTS = {
    "data=8, zero1": Layout(MeshShape(8), PRESETS["zero1"]),
    "fsdp=4 tensor=2, fsdp_tp_sp": Layout(
        MeshShape(1, 4, tensor=2), PRESETS["fsdp_tp_sp"]
    ),
    "data=2 context=4, gathered": Layout(MeshShape(2, context=4), LONG),
}
VARIANTS = ((1, 1), (4, LAYERS))  # accumulate, unroll
MIXED = ((1, LAYERS), (4, 1))  # on one mesh: what is unrolled knows no mesh
TWO_PROCESSES = LAYOUTS["data=2 fsdp=2 tensor=2"]
BY_TURNS = tuple(zip(FAMILIES, itertools.cycle(VARIANTS)))  # what they train there


def batch(number: int) -> dict[str, np.ndarray]:
    """Tokens in documents, and as many labels in a row as it happens to have."""
    rng = np.random.default_rng(number)
    tokens, labels = rng.integers(2, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
    labels[np.arange(LENGTH) >= rng.integers(0, LENGTH + 1, (ROWS, 1))] = IGNORE
    segments = np.sort(rng.integers(0, 3, (ROWS, LENGTH)).astype(np.int32))
    return {"tokens": tokens, "labels": labels, "segments": segments}


@functools.cache
def train(
    family: str,
    layout: Layout,
    accumulate: int = 1,
    unroll: int = 1,
    dtype: str = "float32",
    steps: int = STEPS,
    quantize: str | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses [steps], and the weights after them by path."""
    compute = Compute(
        dtype=dtype, remat="dots", attention=layout.attention, unroll=unroll,
        loss_chunk=5, rules=layout.rules, quantize=quantize,
    )  # fmt: skip
    model = build_model(FAMILIES[family], compute)
    schedule = make_schedule(Schedule(peak=1e-2, warmup=3), 20)
    optimizer = make_optimizer(
        AdamW(weight_decay=0.1, clip=1.0), schedule, decay_mask(model)
    )
    step = make_train_step(model, optimizer, schedule, seed=3, accumulate=accumulate)
    mesh = make_mesh(layout.mesh, jax.devices()[:1] if layout == ONE else None)
    spec = compute.rules.spec("batch", "seq")
    target = abstract_state(model, optimizer, mesh)
    state = jax.tree.map(
        lambda x: placed(np.zeros(x.shape, x.dtype), x.sharding), target
    )
    params = jax.tree.map(
        lambda x, like: placed(x, like.sharding), first_params(family), target.params
    )
    state = dataclasses.replace(state, params=params)  # AdamW's own starts with zeros
    rows = NamedSharding(mesh, spec)
    losses = []
    with jax.set_mesh(mesh):
        for number in range(steps):
            on_mesh = {name: placed(x, rows) for name, x in batch(number).items()}
            state, metrics = step(state, on_mesh)
            losses.append(float(metrics["loss"]))
    return np.array(losses), flatten(process_allgather(state.params, tiled=True))


def placed(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


@functools.cache
def first_params(family: str) -> Params:
    """Made once for all meshes; tests/test_sharding.py compares how each makes them."""
    model = build_model(FAMILIES[family], Compute())
    with jax.set_mesh(make_mesh(ONE.mesh, jax.local_devices()[:1])):
        make = jax.jit(
            lambda: init_params(model, model.compute.rules, jax.random.key(0))
        )
        return jax.tree.map(np.asarray, make())


def main(folder: str) -> None:
    from lm_scale import distributed
    from lm_scale.connect import connect

    connect("matrix", [])
    for family, (accumulate, unroll) in BY_TURNS:
        losses, weights = train(family, TWO_PROCESSES, accumulate, unroll)
        if distributed.index() == 0:
            path = Path(folder) / f"{family}-{accumulate}-{unroll}.npz"
            np.savez(path, losses=losses, **weights)
    distributed.finish()


if __name__ == "__main__":
    main(sys.argv[1])
