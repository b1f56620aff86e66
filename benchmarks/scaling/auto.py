# SPDX-License-Identifier: Apache-2.0
"""The train step as one writes it under Auto axes, to compare ours with.

The same modules, with another layout: the program says where weights and batch lie,
and where activations do at the borders of the sublayers (`with_sharding_constraint`,
as MaxText has it); XLA chooses all else. What Auto has no words for is left out:
`shared`, partial sums, and the type in which gradients are summed.
"""

import contextlib
from unittest.mock import patch

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm_scale import losses
from lm_scale.models import gpt2, layers, llama, scan
from lm_scale.step import TrainState


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices and axes, whose types are the compiler's to choose."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def constrain(x, spec: PartitionSpec):
    """Auto knows no partial sums, so only the partition of `spec` is asked for."""
    spec = PartitionSpec(*spec.partitions)
    return jax.lax.with_sharding_constraint(x, spec)


def make_train_step(model, optimizer, shardings: TrainState, *, accumulate: int):
    """The jitted step; `shardings` are those of the state, on an Auto mesh."""
    graphdef, rules = nnx.split(model)[0], model.compute.rules

    def loss_sum(params, batch):
        hidden = nnx.merge(graphdef, params)(batch["tokens"])
        # Gathered once; else XLA does it for each chunk of the loss.
        table = "output" if "output" in params else "tokens"
        whole = constrain(params[table], rules.spec("vocab", "act_embed"))
        head = nnx.merge(graphdef, params | {table: whole}).head
        labels, chunk = batch["labels"], model.compute.loss_chunk
        return losses.training_loss(head, hidden, labels, chunk=chunk)[0]

    def train_step(state: TrainState, batch):
        labels = jnp.sum(batch["labels"] != losses.IGNORE).astype(jnp.float32)

        def gradients(part):
            return jax.value_and_grad(loss_sum)(state.params, part)

        def split(x):
            parts = x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1)
            return constrain(parts, rules.spec(None, "batch", "seq"))

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradients(part)), None

        if accumulate == 1:
            loss, grads = gradients(batch)
        else:
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(add, zero, jax.tree.map(split, batch))
        scale = 1.0 / jnp.maximum(labels, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss * scale,
            "grad_norm": optax.tree.norm(grads),
            "labels": labels,
        }
        return TrainState(state.step + 1, state.skipped, params, opt_state), metrics

    return jax.jit(
        train_step, donate_argnums=0,
        in_shardings=(shardings, None), out_shardings=(shardings, None),
    )  # fmt: skip


# --- The layout functions of lm_scale/models, for Auto axes ---------------------------


def gather(weight, compute, dtype=None):
    """Only cast: XLA sees for itself that a product needs the whole of it."""
    return weight.astype(dtype or (compute.dtype if weight.ndim > 1 else "float32"))


def spread(weight, x, *dims):
    dims = dims or tuple(range(x.ndim - weight.ndim, x.ndim))
    return jax.lax.broadcast_in_dim(weight, x.shape, dims)


def to_residual(x, rules):
    return constrain(x, rules.spec("batch", "residual_seq", "act_embed"))


def from_residual(x, rules, *axes):
    return constrain(x, rules.spec("batch", "seq", "act_embed"))


def embed(table, ids, compute):
    rows = table[...].astype(compute.dtype)[ids]
    return to_residual(rows, compute.rules)


def split_sequence(x, chunks):
    batch, length, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, length // chunks, chunks, *rest), 2, 0)


def zeros(like):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def with_constraint(function):
    """`function`, its `out_sharding` said as a constraint."""

    def constrained(*operands, out_sharding=None, **options):
        result = function(*operands, **options)
        return result if out_sharding is None else constrain(result, out_sharding)

    return constrained


@contextlib.contextmanager
def auto_layout():
    """Within it, lm_scale's models are traced with the functions above."""
    ours = {
        "gather": gather, "shared": lambda weight, *_: weight, "spread": spread,
        "to_residual": to_residual, "from_residual": from_residual, "embed": embed,
        "split_sequence": split_sequence, "_zeros": zeros,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module in (layers, scan, gpt2, llama, losses):
            for name in ours.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, name, ours[name]))
        stack.enter_context(patch.object(jax, "reshard", constrain))
        for name in ("einsum", "reshape"):
            plain = with_constraint(getattr(jnp, name))
            stack.enter_context(patch.object(jnp, name, plain))
        yield


def on_mesh(state: TrainState, mesh: Mesh) -> TrainState:
    """The shardings of an abstract state, on another mesh."""
    return jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), state)
