# SPDX-License-Identifier: Apache-2.0
"""One optimizer step and one evaluation step: pure functions, ready for `jax.jit`.

Nothing here knows how many devices there are. Under `jax.set_mesh` the arrays' types
say where they live, and the same function runs data-parallel or model-parallel.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from lm_scale.losses import IGNORE, Sums, cross_entropy, training_loss
from lm_scale.models import Model, family_of
from lm_scale.models.compute import Compute
from lm_scale.models.layout import gather, shared, summed
from lm_scale.models.ring import zigzag_order
from lm_scale.objectives import NOWHERE
from lm_scale.optim import MatrixAxes
from lm_scale.sharding import (
    Params,
    Rules,
    init_params,
    map_declarations,
    shards,
    state_axes,
)

# "tokens" and "labels"; perhaps "segments" and "positions", all [B T]; perhaps
# "masked_positions" [B M], the only places that have labels.
Batch = dict[str, Int[Array, "B *"]]
Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    There is no random key in it: dropout is keyed by (seed, step), as the data is.
    """

    step: Int[Array, ""]  # batches used up so far, and so the number of the next step
    skipped: Int[Array, ""]  # those of them that were bad, and made no update
    params: Params
    opt_state: optax.OptState


def init_state(
    model: Model, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Fresh parameters and optimizer state; trace it under `jax.set_mesh`."""
    params = init_params(model, model.compute.rules, jax.random.key(seed))
    return start_state(model, optimizer, params)


def start_state(
    model: Model, optimizer: optax.GradientTransformation, params: Params
) -> TrainState:
    """The state before the first update of these parameters."""
    cut = jax.tree.map(jax.reshard, params, optimizer_specs(model))
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, params, optimizer.init(cut))


def optimizer_specs(model: Model) -> Params:
    """How each weight is cut where it is updated: `embed` as `state_embed` says."""

    def spec(_, weight: nnx.Param) -> PartitionSpec:
        return model.compute.rules.spec(*state_axes(weight.get_metadata("axes")))

    return map_declarations(model, spec)


def gather_head(params: Params, compute: Compute) -> Params:
    """The weights outside the blocks gathered, in f32: once for all parts of the loss.

    In f32, as the parts' gradients are added up in this type.
    """
    rest = {name: x for name, x in params.items() if name != "blocks"}
    return params | jax.tree.map(lambda x: gather(x, compute, "float32"), rest)


def zero_gradient(weight: Array) -> Array:
    """Zeros of the type of a `shared` weight's gradient: partial sums."""
    spec = jax.typeof(weight).sharding.spec
    partial_sum = PartitionSpec(*spec.partitions, unreduced=spec.reduced)
    return jnp.zeros(weight.shape, weight.dtype, out_sharding=partial_sum)


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings: a checkpoint's target."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(lambda: init_state(model, optimizer, seed=0))

    def rebound(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # eval_shape speaks of an abstract mesh (of none for scalars made in the step);
        # a restore needs the devices.
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(rebound, state)


def decay_mask(model: Model) -> Params:
    """True for each weight whose declaration allows weight decay."""
    return map_declarations(model, lambda _, weight: weight.get_metadata("decay"))


def matrix_axes(model: Model) -> Params:
    """The matrices in each weight: those that Hugging Face keeps, one a name and layer.

    Whether they are transposed there is left out: rows and columns are alike to
    Adafactor, the only one to ask.
    """
    names = family_of(model.config).hf_names

    def axes(path: str, weight: nnx.Param) -> MatrixAxes:
        entry, logical = names[path], weight.get_metadata("axes")
        own = list(range(len(logical)))
        if logical[0] == "layers":
            del own[0]
        if len(entry.names) > 1:
            del own[entry.stack_axis]
        return MatrixAxes(tuple(own[: entry.inputs]), tuple(own[entry.inputs :]))

    return map_declarations(model, axes)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulate: int = 1,
    skip_bad: bool = True,
    xla_options: Mapping[str, str] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: (state, batch) -> (state, metrics); donates the state.

    The loss is the mean over all labels of the global batch, on any mesh and for any
    `accumulate` (the number of equal parts that the batch is worked through in).
    Metrics: loss (nats), grad_norm (before clipping), learning_rate, labels (their
    number). Raises ValueError at trace time if the batch cannot be cut.

    skip_bad: if the loss or the gradient norm is not finite, parameters and optimizer
    state stay what they were, bit for bit, and only `step` and `skipped` go on. Metrics
    are then skipped (1 if this update was, else 0) and skipped_total besides.
    xla_options: of the compiler, by name.
    """
    graphdef, compute = nnx.split(model)[0], model.compute
    state_specs = optimizer_specs(model)

    def loss_sum(params: Params, batch: Batch, key: Key[Array, ""]):
        hidden, head, labels = apply(graphdef, params, batch, key)
        return training_loss(head, hidden, labels, chunk=compute.loss_chunk)

    def gradients(params: Params, batch: Batch, key: Key[Array, ""]):
        """Summed over the tokens of each device, and the losses, of the whole batch."""

        def of_part(number, part: Batch):
            part_key = jax.random.fold_in(key, number)
            return jax.grad(loss_sum, has_aux=True)(params, part, part_key)

        def add(sums: Params, numbered):
            grads, losses = of_part(*numbered)
            return jax.tree.map(jnp.add, sums, grads), losses

        if accumulate == 1:
            return of_part(0, batch)
        parts = jax.tree.map(lambda x: split_batch(x, accumulate), batch)
        zero = jax.tree.map(zero_gradient, params)
        return jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))

    def reduce(gradient: Array, spec: PartitionSpec) -> Array:
        total = summed(gradient.astype(compute.grad_dtype), spec)
        return total.astype(jnp.float32)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        labels = jnp.sum(batch["labels"] != IGNORE).astype(jnp.float32)
        # Gradients of these stay partial sums on each device until `reduce`.
        params = jax.tree.map(lambda x: shared(x, compute.rules), state.params)
        grads, losses = gradients(params, batch, key)
        scale = 1.0 / jnp.maximum(labels, 1.0)
        with jax.named_scope("reduce"):
            grads = jax.tree.map(lambda g, s: reduce(g, s) * scale, grads, state_specs)
        loss, grad_norm = jnp.sum(losses) * scale, optax.tree.norm(grads)
        good = is_good(loss, grad_norm) if skip_bad else None
        with jax.named_scope("optimizer"):
            params, opt_state = update(optimizer, state, grads, state_specs, good)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            # The optimizer counts the updates that it made.
            "learning_rate": jnp.asarray(
                schedule(state.step - state.skipped), jnp.float32
            ),
            "labels": labels,
        }
        skipped = state.skipped
        if good is not None:
            skipped += 1 - good.astype(jnp.int32)
            metrics["skipped"] = 1.0 - good.astype(jnp.float32)
            metrics["skipped_total"] = skipped.astype(jnp.float32)
        return TrainState(state.step + 1, skipped, params, opt_state), metrics

    options: dict[str, str | bool] = dict(xla_options or {})
    return jax.jit(train_step, donate_argnums=0, compiler_options=options or None)


def is_good(loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> Bool[Array, ""]:
    """If an update may be made: both, of the whole batch, are finite.

    They are sums over all devices, so this is the same everywhere. A norm is a sum of
    squares: nothing cancels, and one gradient that is not finite makes it so. It also
    overflows, to infinity, if finite gradients are above 1e19; that is bad too: Adam
    would square them, and its second moment stay infinite, and that weight as it is.
    """
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def update(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    specs: Params,
    good: Bool[Array, ""] | None,
) -> tuple[Params, optax.OptState]:
    """Parameters and optimizer state after an update, each where it lives.

    specs: how each weight is cut while it is updated, as the gradients are. good: if
    it may be made; None: it is, whatever comes.
    """
    old = jax.tree.map(jax.reshard, state.params, specs)
    updates, opt_state = optimizer.update(grads, state.opt_state, old)
    new = cast(Params, optax.apply_updates(old, updates))
    if good is not None:
        new = choose(good, new, old)
        opt_state = choose(good, opt_state, state.opt_state)
    params = jax.tree.map(
        lambda x, was: jax.reshard(x, jax.typeof(was).sharding.spec), new, state.params
    )
    return params, opt_state


def choose(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """All of `new` if good, else all of `old`, bit for bit; each leaf where it lives.

    For TPUs XLA makes it a part of the update; for CPUs it copies Adam's moments first.
    """
    return jax.tree.map(lambda x, was: jax.lax.select(good, x, was), new, old)


def make_eval_step(model: Model) -> Callable[[Params, Batch], Sums]:
    """The jitted evaluation step: summed loss, right guesses and number of labels."""
    graphdef, chunk = nnx.split(model)[0], model.compute.loss_chunk

    def eval_step(params: Params, batch: Batch) -> Sums:
        hidden, head, labels = apply(graphdef, params, batch)
        sums = cross_entropy(head, hidden, labels, chunk=chunk, accuracy=True)
        return jax.tree.map(jnp.sum, sums)

    return jax.jit(eval_step)


def apply(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
):
    """Hidden states, the head that makes logits of them (centred), and the labels.

    All in one order; of all places, or of `masked_positions` if the batch has them. The
    head's weights are gathered here, once for all chunks of the loss.
    """
    model = nnx.merge(graphdef, params)
    whole = gather_head(params, model.compute)
    if "output" not in params and not model.compute.reshard_after_forward:
        # The table that the head needs whole serves the embedding as well.
        model = nnx.merge(graphdef, params | {"tokens": whole["tokens"]})
    batch, positions = lay_out(model, batch)
    hidden = model(
        batch["tokens"], positions=positions, segments=batch.get("segments"), key=key
    )
    labels = batch["labels"]
    if "masked_positions" in batch:
        hidden, labels = pick(
            hidden, labels, batch["masked_positions"], model.compute.rules
        )
    head = functools.partial(nnx.merge(graphdef, whole).head, centre=True)
    return hidden, head, labels


def lay_out(
    model: Model, batch: Batch
) -> tuple[Batch, Int[Array, "T"] | Int[Array, "B T"] | None]:
    """The rows in the order that attention wants, and their tokens' positions in them.

    They are the batch's own, if it has any. None: in order. Causal ring attention
    wants `zigzag_order`, which gives the devices that share a row equal work; only the
    tokens' numbers are exchanged for it.
    """
    compute = model.compute
    if compute.attention != "ring" or not family_of(model.config).causal:
        return batch, batch.get("positions")
    parts = shards(compute.rules, jax.sharding.get_abstract_mesh(), "seq")
    order = zigzag_order(batch["tokens"].shape[1], parts)

    def reordered(x: Int[Array, "B T"]) -> Int[Array, "B T"]:
        whole = jax.reshard(x, compute.rules.spec("batch", None))
        return jax.reshard(whole[:, order], compute.rules.spec("batch", "seq"))

    batch = jax.tree.map(reordered, batch)
    positions = jax.reshard(jnp.asarray(order), compute.rules.spec("seq"))
    return batch, batch.get("positions", positions)


def pick(
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    places: Int[Array, "B M"],
    rules: Rules,
) -> tuple[Float[Array, "B N D"], Int[Array, "B N"]]:
    """Hidden states and labels at these places of each row; N: M, rounded up.

    To a multiple of the parts that the mesh cuts a sequence into, and each part gets
    as many. A place below 0 is none, and has no label.
    """
    parts = shards(rules, jax.sharding.get_abstract_mesh(), "seq")
    places = jax.reshard(places, rules.spec("batch", None))
    missing = -places.shape[1] % parts
    places = jnp.pad(places, ((0, 0), (0, missing)), constant_values=NOWHERE)
    row = jnp.arange(labels.shape[1])
    # A product with zeros and ones, not a lookup: it sums over the parts of a row what
    # each has of it, and its gradient goes back to them. T / V of the head's work.
    chosen = places[:, :, None] == row
    mixed = jnp.einsum(
        "BNT,BTD->BND", chosen.astype(hidden.dtype), hidden,
        out_sharding=rules.spec("batch", "seq", "act_embed"),
    )  # fmt: skip
    whole = jax.reshard(labels, rules.spec("batch", None))
    found = jnp.sum(jnp.where(chosen, whole[:, None, :], 0), axis=-1)
    found = jnp.where(places >= 0, found, IGNORE)
    return mixed, jax.reshard(found, rules.spec("batch", "seq"))


def split_batch(x: Int[Array, "B T"], parts: int) -> Int[Array, "parts rows T"]:
    """[B T] -> [parts B/parts T], each part spread over all the devices.

    Row r goes to part r % parts: splitting the batch axis the other way round would
    put the devices on the `parts` axis, and each part on a few of them.
    """
    (batch, length), spec = x.shape, jax.typeof(x).sharding.spec
    if batch % parts:
        raise ValueError(
            f"A batch of {batch} rows cannot be cut into {parts} equal parts."
        )
    parted = jnp.reshape(
        x,
        (batch // parts, parts, length),
        out_sharding=PartitionSpec(spec[0], None, spec[1]),
    )
    return parted.swapaxes(0, 1)
