# SPDX-License-Identifier: Apache-2.0
"""What the devices send one another in a step, and what they hold: read off programs.

Compiled for 8 simulated devices, where XLA leaves collectives as they were asked for.
"""

import functools
import math
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding

from lm_scale.models import (
    Compute,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    build_model,
)
from lm_scale.models.layout import mesh_axes_of
from lm_scale.optim import AdamW, Schedule, make_optimizer, make_schedule
from lm_scale.sharding import (
    PRESETS,
    MeshShape,
    abstract_mesh,
    declarations,
    make_mesh,
)
from lm_scale.step import (
    abstract_state,
    decay_mask,
    make_eval_step,
    make_train_step,
)

# Weights that are large beside the activations: 0.79 M in a block, 4 M in all.
LLAMA = LlamaConfig(
    vocab=1024, positions=16, layers=3, embed=256, heads=8, kv_heads=8, head_dim=32,
    mlp=688,
)  # fmt: skip
SMALL = {"vocab": 64, "positions": 16, "layers": 2, "embed": 32, "heads": 4, "mlp": 48}
GPT2, ROBERTA = GPT2Config(**SMALL), RobertaConfig(**SMALL)
ROWS, LENGTH = 32, 16
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


@dataclass(frozen=True)
class Collective:
    """One of a compiled program."""

    kind: str
    dtypes: frozenset[str]
    bytes: int  # of its results on a device
    loops: int  # how many loops it is inside of


COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|"
    r'collective-permute)\(.*op_name="([^"]*)"'
)


def collectives(text: str) -> list[Collective]:
    found = []
    for result, kind, name in COLLECTIVE.findall(text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        sizes = [math.prod(map(int, filter(None, s.split(",")))) for _, s in arrays]
        total = sum(
            n * BYTES[dtype] for n, (dtype, _) in zip(sizes, arrays, strict=True)
        )
        dtypes = frozenset(dtype for dtype, _ in arrays)
        # A chunk of the loss asks all devices in one byte if its logits need their
        # largest (losses._log_sum).
        if (kind, total, dtypes) != ("all-reduce", 1, {"pred"}):
            found.append(Collective(kind, dtypes, total, name.count("while/body")))
    return found


def model_of(rules: str, config=LLAMA, **compute):
    settings = {"dtype": "float32", "attention": "xla", "loss_chunk": 8} | compute
    return build_model(config, Compute(rules=PRESETS[rules], **settings))


def traced(model, mesh, *, accumulate=1, rows=ROWS, length=LENGTH):
    """The train step, and what it is to be called with."""
    schedule = make_schedule(Schedule(), 10)
    optimizer = make_optimizer(AdamW(), schedule, decay_mask(model))
    step = make_train_step(model, optimizer, schedule, seed=0, accumulate=accumulate)
    cut = NamedSharding(mesh, model.compute.rules.spec("batch", "seq"))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=cut)
    state = abstract_state(model, optimizer, mesh)
    return step, (state, {"tokens": tokens, "labels": tokens})


@functools.cache
def compiled(
    rules: str, shape: MeshShape, *, config=LLAMA, accumulate=1, rows=ROWS, **compute
):
    model, mesh = model_of(rules, config, **compute), make_mesh(shape)
    with jax.set_mesh(mesh):
        step, arguments = traced(model, mesh, accumulate=accumulate, rows=rows)
        return step.lower(*arguments).compile()


def of(rules: str, shape: MeshShape, **options) -> list[Collective]:
    return collectives(compiled(rules, shape, **options).as_text())


def weight_bytes(config=LLAMA, *, blocks: bool = True) -> int:
    declared = declarations(model_of("dp", config))
    return sum(
        4 * math.prod(weight.get_value().shape)
        for path, weight in declared.items()
        if blocks or not path.startswith("blocks.")
    )


WEIGHTS = weight_bytes()
BLOCK = (WEIGHTS - weight_bytes(blocks=False)) // LLAMA.layers
SCALARS = 100  # bytes: sums of labels, of losses and of squares


# --- Gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "accumulate"), [(LLAMA, 1), (LLAMA, 4), (GPT2, 4), (ROBERTA, 4)]
)
def test_replicas_speak_once_a_step(config, accumulate):
    """All gradients, in f32; nothing in the loops over parts, layers and logits."""
    found = of("dp", MeshShape(8), config=config, accumulate=accumulate)
    assert [c for c in found if c.loops] == []
    assert {c.kind for c in found} == {"all-reduce"}
    assert 0 <= sum(c.bytes for c in found) - weight_bytes(config) <= SCALARS
    assert max(found, key=lambda c: c.bytes).dtypes == {"f32"}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_zero1_scatters_gradients_and_gathers_weights(accumulate):
    found = of("zero1", MeshShape(8), accumulate=accumulate)
    assert [c for c in found if c.loops] == []
    vectors = 4 * LLAMA.embed * (2 * LLAMA.layers + 1)  # norm scales, which are whole
    for kind, size in (
        ("reduce-scatter", (WEIGHTS - vectors) // 8),
        ("all-gather", WEIGHTS - vectors),
    ):
        assert sum(c.bytes for c in found if c.kind == kind) == size
    rest = [c for c in found if c.kind == "all-reduce"]
    assert 0 <= sum(c.bytes for c in rest) - vectors <= SCALARS


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fsdp_scatters_a_layer_s_gradients_as_it_sums_them(accumulate):
    """A part of the batch at a time: whole gradients would not fit."""
    found = of("fsdp", MeshShape(1, fsdp=8), accumulate=accumulate)
    large = [c for c in found if c.bytes > BLOCK / 100]
    assert "all-reduce" not in {c.kind for c in large}
    scattered = [c for c in large if c.kind == "reduce-scatter"]
    depth = 1 + (accumulate > 1)  # inside of the loop over layers, and that over parts
    matrices = BLOCK - 2 * 4 * LLAMA.embed
    assert sum(c.bytes for c in scattered if c.loops == depth) == matrices // 8
    assert {d for c in scattered for d in c.dtypes} == {"f32"}


def test_replicas_of_fsdp_speak_once_a_step():
    """Of data=2×fsdp=4 the shards are summed over `data` after the loops."""
    found = of("fsdp", MeshShape(2, fsdp=4), accumulate=4)
    after = [c for c in found if c.kind == "all-reduce" and c.bytes > SCALARS]
    assert all(c.loops == 0 for c in after)
    vectors = 4 * LLAMA.embed * (2 * LLAMA.layers + 1)
    shards = (WEIGHTS - vectors) // 4 + vectors
    assert 0 <= sum(c.bytes for c in after) - shards <= 2 * vectors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_sent_in_the_type_that_the_config_names(dtype):
    """As it is asked for: CPUs themselves sum bf16 in f32."""
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    for rules, shape in (("dp", MeshShape(8)), ("fsdp", MeshShape(1, fsdp=8))):
        model = model_of(rules, grad_dtype=dtype, dtype="bfloat16")
        with jax.set_mesh(mesh := make_mesh(shape)):
            step, arguments = traced(model, mesh)
            text = step.lower(*arguments).as_text()
        summed = re.findall(
            r'"stablehlo\.(?:all_reduce|reduce_scatter)".*?'
            r"\}\) : \(tensor<(?:\d+x)*(\w+)>\)",
            text, re.DOTALL,
        )  # fmt: skip
        assert len(summed) >= 8 and set(summed) == {short}


def products(**compute) -> int:
    """Of a step whose layers are one turn of the loop, so that there is none."""
    text = compiled("dp", MeshShape(), rows=8, unroll=LLAMA.layers, **compute).as_text()
    return len(re.findall(r" dot\(", text))


def test_what_is_computed_again_is_not_merged_inside_of_a_turn():
    """XLA would keep all of the first computation, as if remat were `none`."""
    kept = products(remat="none")
    # Of each layer: all but what comes out of attention; and that too.
    again = [products(remat=remat) - kept for remat in ("attention", "full")]
    assert LLAMA.layers * 4 <= again[0] <= again[1]


# --- Weights --------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_fsdp_gathers_one_block_at_a_time(remat):
    found = of("fsdp", MeshShape(1, fsdp=8), remat=remat)
    gathered = [c for c in found if c.kind == "all-gather" and c.loops == 1]
    # In the loop over layers, forward and backward; each passes one block.
    assert BLOCK * 0.9 < sum(c.bytes for c in gathered) <= 2 * BLOCK
    # Six layers more add their shards, but not one block more that is whole.
    small, large = (
        compiled("fsdp", MeshShape(1, fsdp=8), config=config, remat=remat, rows=8)
        for config in (LLAMA, replace(LLAMA, layers=LLAMA.layers + 6))
    )
    added = (
        large.memory_analysis().temp_size_in_bytes
        - small.memory_analysis().temp_size_in_bytes
    )
    assert added < 6 * BLOCK / 2


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_is_not_resharded_is_gathered_once(remat):
    how = {"remat": remat, "reshard_after_forward": False}
    found = of("fsdp", MeshShape(1, fsdp=8), **how)
    gathered = [c for c in found if c.kind == "all-gather" and c.loops == 1]
    assert BLOCK * 0.9 < sum(c.bytes for c in gathered) <= BLOCK
    # And kept: each layer more adds its weights.
    small, large = (
        compiled("fsdp", MeshShape(1, fsdp=8), config=config, rows=8, **how)
        for config in (LLAMA, replace(LLAMA, layers=LLAMA.layers + 6))
    )
    added = (
        large.memory_analysis().temp_size_in_bytes
        - small.memory_analysis().temp_size_in_bytes
    )
    assert added > 6 * BLOCK * 0.9


def test_whole_weights_are_kept_in_whatever_type_xla_likes():
    """Only activations are kept by the policy, for which JAX fixes the type.

    On a TPU products need bf16 alone of f32 weights: a gather of half the bytes.
    """
    model, mesh = model_of("fsdp", reshard_after_forward=False), make_mesh(MeshShape(8))
    with jax.set_mesh(mesh):
        step, arguments = traced(model, mesh)
        text = step.lower(*arguments).as_text()
    fixed = re.findall(r"reduce_precision[^\n]*tensor<(\d+x\d+)x", text)
    assert set(fixed) == {f"{ROWS}x{LENGTH}"}


@pytest.mark.parametrize(
    ("config", "reshard", "exchanges"),
    [
        (replace(ROBERTA, vocab=256), True, 2),  # of tokens; positions are fewer
        (replace(ROBERTA, vocab=256), False, 0),
        (replace(ROBERTA, vocab=64), True, 0),  # a device has as many tokens
        (LLAMA, False, 2),  # its head has a table of its own
    ],
)
def test_a_table_or_what_is_looked_up_is_sent(config, reshard, exchanges):
    """Whichever is less; the rows that are looked up go forward and back."""
    found = of(
        "fsdp", MeshShape(1, fsdp=8), config=config, reshard_after_forward=reshard
    )
    assert sum(c.kind == "all-to-all" for c in found) == exchanges
    # For the head; XLA makes one of two.
    table = [c for c in found if c.bytes == 4 * config.vocab * config.embed]
    assert [c.kind for c in table] == ["all-gather"]


def test_an_evaluation_gathers_the_head_once():
    """And not for each chunk of the loss, of which there are two here."""
    model, mesh = model_of("fsdp"), make_mesh(MeshShape(1, fsdp=8))
    with jax.set_mesh(mesh):
        _, (state, batch) = traced(model, mesh)
        text = make_eval_step(model).lower(state.params, batch).compile().as_text()
    gathered = [c for c in collectives(text) if c.kind == "all-gather" and c.loops]
    assert sum(c.bytes for c in gathered) == BLOCK - 2 * 4 * LLAMA.embed


def forward(rules: str, shape: MeshShape) -> list[Collective]:
    """Of the blocks alone, in a loop."""
    model, mesh = model_of(rules), make_mesh(shape)
    graphdef = nnx.split(model)[0]
    cut = NamedSharding(mesh, model.compute.rules.spec("batch", "seq"))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=cut)
    schedule = make_schedule(Schedule(), 10)
    optimizer = make_optimizer(AdamW(), schedule, decay_mask(model))
    params = abstract_state(model, optimizer, mesh).params
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
        return collectives(run.lower(params, tokens).compile().as_text())


def test_tensor_parallelism_sums_twice_a_block():
    found = [c for c in forward("fsdp_tp", MeshShape(1, tensor=8)) if c.loops]
    assert [c.kind for c in found] == ["all-reduce"] * 2
    assert {c.bytes for c in found} == {4 * ROWS * LENGTH * LLAMA.embed}


def test_sequence_parallelism_makes_gathers_and_scatters_of_them():
    found = [c for c in forward("fsdp_tp_sp", MeshShape(1, tensor=8)) if c.loops]
    kinds = ["all-gather", "reduce-scatter"] * 2
    assert sorted(c.kind for c in found) == sorted(kinds)
    whole = 4 * ROWS * LENGTH * LLAMA.embed
    assert {(c.kind, c.bytes) for c in found} == {
        ("all-gather", whole), ("reduce-scatter", whole // 8)
    }  # fmt: skip


# --- What is whole on every device ----------------------------------------------------

WIDE = LlamaConfig(
    vocab=4096, positions=1024, layers=4, embed=512, heads=8, kv_heads=8, head_dim=64,
    mlp=1536,
)  # fmt: skip
MEBIBYTE = 2**20


def arrays_of(jaxpr):
    """The types of all values of a program, those of its loops included."""
    for value in (*jaxpr.invars, *jaxpr.constvars):
        yield value.aval
    for equation in jaxpr.eqns:
        yield from (value.aval for value in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            # Inside of shard_map shapes are those of a device, cut already.
            if equation.primitive.name != "shard_map":
                yield from arrays_of(inner)


def is_whole(aval, mesh) -> bool:
    """If all devices have all of this type of value, which has over 1 MiB."""
    if not isinstance(aval, jax.core.ShapedArray) or not aval.ndim:
        return False
    if set(aval.sharding.mesh.axis_types) != {AxisType.Explicit}:
        return False  # inside of a lookup, whose sharding the compiler finds
    cut = [axis for axis in mesh_axes_of(aval.sharding.spec) if mesh.shape[axis] > 1]
    return not cut and aval.size * aval.dtype.itemsize > MEBIBYTE


def whole_arrays(rules: str, shape: MeshShape) -> tuple[set[str], set[str]]:
    """Of the state the paths, of a step's values the shapes, of what `is_whole`.

    Shardings are types, so that a trace knows them all.
    """
    model, mesh = model_of(rules, WIDE, dtype="bfloat16"), abstract_mesh(shape, 8)
    with jax.sharding.use_abstract_mesh(mesh):
        step, (state, batch) = traced(model, mesh, accumulate=2, length=1024)
        jaxpr = jax.make_jaxpr(step)(state, batch).jaxpr
    kept = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, _), value in zip(
            jax.tree.leaves_with_path(state), jaxpr.eqns[0].invars, strict=False
        )
        if is_whole(value.aval, mesh)
    }
    shapes = {aval.shape for aval in arrays_of(jaxpr) if is_whole(aval, mesh)}
    return kept, {"×".join(map(str, shape)) for shape in shapes}


MATRICES = (
    "tokens", "output", "blocks.q", "blocks.kv", "blocks.out", "blocks.up",
    "blocks.down",
)  # fmt: skip
PARAMS = {f"params.{name}" for name in MATRICES}
MOMENTS = {f"opt_state.1.0.{m}.{name}" for m in ("mu", "nu") for name in MATRICES}
STACKED = {"4×512×8×64", "4×512×2×8×64", "4×8×64×512", "4×512×2×1536", "4×1536×512"}
CUT_OUT = {"512×2×8×64"}  # of a stack that is whole, with its heads apart
# One block's, gathered to be used, and their gradients; so with the tables outside.
USED = {"512×2×512", "512×2×1536", "512×1×1536", "1536×512", "512×1536", "4096×512"}
MASK = {"1×1×1024×1024"}  # which key a query sees, compared where it is used


@pytest.mark.parametrize(
    ("rules", "shape", "kept", "shapes"),
    [
        ("dp", MeshShape(8), PARAMS | MOMENTS, STACKED | CUT_OUT | USED),
        ("zero1", MeshShape(8), PARAMS, STACKED | CUT_OUT | USED),
        ("fsdp", MeshShape(1, fsdp=8), set(), USED),
        ("fsdp_tp", MeshShape(1, fsdp=4, tensor=2), set(), set()),
        ("fsdp_tp_sp", MeshShape(1, fsdp=4, tensor=2), set(), set()),
        ("context", MeshShape(1, fsdp=2, context=2, tensor=2), set(), set()),
    ],
)
def test_nothing_else_is_whole_on_every_device(rules, shape, kept, shapes):
    assert whole_arrays(rules, shape) == (kept, shapes | MASK)
