# SPDX-License-Identifier: Apache-2.0
"""Attention without its matrix of scores: the kernels, and which one a run takes.

    devices                     kernel  because
    any, sequences cut          ring    keys and values go round (models/ring.py)
    TPU v4 and later            splash  Pallas; passes over blocks that a mask rules out
    TPU v2, v3; others if       vmem    Pallas, our own, for rows up to 1024:
      weights are dropped out             models/vmem.py
    NVIDIA, capability >= 8.0   cudnn   flash attention of the maker, in bf16
    others                      xla     a few blocks of queries: models/blockwise.py

Flash attention (Dao et al. 2022) makes the scores a block at a time and keeps none, so
its memory grows with the length of a sequence and not with its square. Masks and
results are those of `xla`, but for rounding, and for a query that may look nowhere.
Only `xla` and `vmem` drop out attention weights, and only `ring` takes sequences that
the mesh cuts; `xla` gathers their keys and values.
`choose_attention` settles it once, by the mesh's devices: a program may be compiled for
TPUs on a machine that has none.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from lm_scale.errors import InputError
from lm_scale.models.compute import Compute
from lm_scale.models.dropout import words_of
from lm_scale.models.layout import LANES, kept, spread
from lm_scale.models.vmem import Call, attend_in_vmem, vmem_obstacle
from lm_scale.sharding import Rules, shards

Kernel = Literal["xla", "splash", "vmem", "cudnn", "ring"]
TPUS_WITHOUT_SPLASH = ("TPU v2", "TPU v3")
NO_SEGMENT = jnp.iinfo(jnp.int32).min  # of the tokens that fill up a block
BLOCK = 512  # Splash's blocks are so long, or what of it divides the sequence


def choose_attention(
    compute: Compute,
    model: Any,
    mesh: Mesh,
    *,
    length: int,
    causal: bool,
    segments: bool,
    ragged: bool = False,
) -> tuple[Kernel, str]:
    """The kernel that a run takes on these devices, and a sentence that says why.

    `model` is the config of any family; `length`: positions of a sequence; `segments`:
    rows hold documents that must not see each other; `ragged`: batches are as long as
    their longest document. Raises InputError if `compute.attention` names a kernel that
    cannot do what this run needs.
    """
    device = mesh.devices.flat[0]
    wanted = compute.attention
    if wanted == "xla":
        return "xla", f"xla ({device.device_kind})"
    parts = shards(compute.rules, mesh, "seq")
    if wanted == "auto":
        best: dict[str, Kernel] = {"tpu": "splash", "gpu": "cudnn"}
        if device.device_kind in TPUS_WITHOUT_SPLASH or model.attention_dropout:
            best["tpu"] = "vmem"
        if parts == 1 and device.platform not in best:
            return "xla", f"xla ({device.device_kind})"
        kernel = best[device.platform] if parts == 1 else "ring"
    else:
        kernel = wanted
    reason = _obstacle(kernel, device, compute, model, segments)
    reason = reason or _obstacle_of_length(kernel, parts, length, causal)
    if reason is None and kernel == "vmem":
        heads = model.heads // shards(compute.rules, mesh, "act_heads")
        reason = vmem_obstacle(heads, head_dim_of(model), length, compute.dtype)
        if ragged:
            reason = (
                "vmem takes rows of whole blocks of 128 tokens, and those of documents "
                "end anywhere (data.pad_to_seq_len = True fills them up)"
            )
        if reason and wanted == "auto" and model.attention_dropout:
            reason += f"; and {_cannot_drop('splash', model)}"
    if reason is None:
        return kernel, f"{kernel} ({device.device_kind})"
    if wanted == "auto":
        return "xla", f"xla ({device.device_kind}), because {reason}"
    raise InputError(
        f"compute.attention = {wanted!r} does not work here, because {reason}. Change "
        f"that, or set compute.attention to auto, which takes what works."
    )


def _obstacle(
    kernel: Kernel,
    device: Any,
    compute: Compute,
    model: Any,
    segments: bool,
) -> str | None:
    """What keeps a run from this kernel, to be read after "because"."""
    kind = device.device_kind
    if kernel == "splash" and device.platform != "tpu":
        return f"splash is for TPUs, and the devices are {kind}"
    if kernel == "splash" and kind in TPUS_WITHOUT_SPLASH:
        return f"splash needs a TPU v4 or later, and the devices are {kind}"
    if kernel == "cudnn" and device.platform != "gpu":
        return f"cudnn is for NVIDIA's GPUs, and the devices are {kind}"
    if kernel == "cudnn":
        reason = _cudnn_obstacle(device, compute, model, segments)
        if reason is not None:
            return reason
    if kernel == "vmem" and device.platform != "tpu":
        return f"vmem is for TPUs, and the devices are {kind}"
    if kernel == "vmem" and getattr(model, "window", None) is not None:
        return f"vmem has no sliding window (model.window = {model.window})"
    if model.attention_dropout and kernel != "vmem":
        return _cannot_drop(kernel, model)
    return None


def _cannot_drop(kernel: str, model: Any) -> str:
    return (
        f"{kernel} does not drop out attention weights "
        f"(model.attention_dropout = {model.attention_dropout})"
    )


def _obstacle_of_length(
    kernel: Kernel, parts: int, length: int, causal: bool
) -> str | None:
    if kernel != "ring":
        if parts == 1:
            return None
        return f"{kernel} takes whole sequences, and the mesh cuts them into {parts}"
    if parts == 1:
        return "ring is for sequences that the mesh cuts, and this one does not"
    if causal and length % (2 * parts):
        return (
            f"ring lays a sequence out in 2 × {parts} equal chunks, and its {length} "
            f"positions are no multiple of that"
        )
    return None


def _cudnn_obstacle(
    device: Any, compute: Compute, model: Any, segments: bool
) -> str | None:
    # "9.0"; AMD's GPUs, which are of this platform too, have another form of it.
    capability = str(getattr(device, "compute_capability", "unknown"))
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return (
            f"cudnn needs a GPU of NVIDIA's compute capability 8.0 (A100) or later, "
            f"and that of {device.device_kind} is {capability}"
        )
    if compute.dtype != "bfloat16":
        return f"cudnn computes in bfloat16 (compute.dtype = {compute.dtype})"
    head_dim = head_dim_of(model)
    most = 256 if int(major) >= 9 else 128
    if head_dim % 8 or head_dim > most:
        return f"cudnn needs a head_dim of 8, 16 ... {most}, and it is {head_dim}"
    if segments:
        # They could be given as a matrix, but jax 0.10 then asks for the gradient of
        # that too, which cuDNN has for a batch of one row only (jax issue 30593).
        return "cudnn cannot keep the documents or the padding of a row apart"
    return None


def head_dim_of(model: Any) -> int:
    """The width of a head, of any family's config."""
    return getattr(model, "head_dim", model.embed // model.heads)


def splash(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K N"],
    *,
    causal: bool,
    window: int | None,
    segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B T"] | None,
    rules: Rules,
    interpret: bool = False,
) -> Float[Array, "B T H N"]:
    """`attention.attention` by the Pallas kernel for TPUs, forward and backward.

    Sequences of any length, but not cut. `interpret` runs it on any device, slowly.
    """
    T = q.shape[1]
    padded = -(-T // LANES) * LANES
    if segments is None and padded > T and not causal:
        segments = jnp.zeros(
            q.shape[:2], jnp.int32, out_sharding=rules.spec("batch", None)
        )
    if key_segments is None:
        key_segments = segments
    block = math.gcd(padded, BLOCK)
    blocks = splash_attention.BlockSizes(
        block_q=block, block_kv=block,
        block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = _splash_mask(padded, causal, window)

    def fill(x, value=0):
        """Padding behind the sequence, so that the blocks divide it."""
        return jnp.pad(
            x,
            [(0, 0), (0, padded - T), *[(0, 0)] * (x.ndim - 2)],
            constant_values=value,
        )

    def attend(q, k, v, segments, key_segments):
        heads, scale = q.shape[2], q.shape[3] ** -0.5
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([mask] * heads),
            block_sizes=blocks, residual_checkpoint_name="attention",
            interpret=interpret,
        )  # fmt: skip
        ids = None
        if segments is not None:
            ids = splash_attention.SegmentIds(
                fill(segments, NO_SEGMENT), fill(key_segments, NO_SEGMENT)
            )
        q, k, v = (kept(fill(x).swapaxes(1, 2)) for x in (q * scale, k, v))
        mixed: Any = jax.vmap(kernel)(q, k, v, ids)
        return mixed.swapaxes(1, 2)[:, :T]

    return _on_each_device(attend, q, k, v, segments, key_segments, rules=rules)


def _splash_mask(length: int, causal: bool, window: int | None):
    shape = (length, length)
    if window is not None:
        right = 0 if causal else window - 1
        return splash_attention.LocalMask(shape, (window - 1, right), 0)
    if causal:
        return splash_attention.CausalMask(shape)
    return splash_attention.FullMask(shape)


def cudnn(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K N"],
    *,
    causal: bool,
    window: int | None,
    rules: Rules,
) -> Float[Array, "B T H N"]:
    """`attention.attention` by cuDNN's kernel, forward and backward.

    For bf16, whole sequences, no segments; a window in causal attention only.
    Under remat `attention` its result is kept, but the kernel runs again for the sums
    of the softmax, which it does not give away.
    """
    attend = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=causal, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    return checkpoint_name(_on_each_device(attend, q, k, v, rules=rules), "attention")


def vmem_takes(q: Float[Array, "B T H N"], rules: Rules) -> bool:
    """If rows of such queries can go through `vmem`: those of an evaluation, say."""
    heads = q.shape[2] // shards(rules, jax.sharding.get_abstract_mesh(), "act_heads")
    return vmem_obstacle(heads, q.shape[3], q.shape[1], str(q.dtype)) is None


def vmem(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K N"],
    *,
    causal: bool,
    segments: Int[Array, "B T"] | None,
    biases: Float[Array, "3 H N"] | None,
    dropout_rate: float,
    key: Key[Array, ""] | None,
    rules: Rules,
    interpret: bool = False,
) -> Float[Array, "B T H N"]:
    """`attention.attention` by our own kernel for TPUs, forward and backward.

    For rows that `vmem_obstacle` has nothing against. Drops out the same weights as
    `xla`. `interpret` runs it on any device, slowly.
    """
    B, T, H, N = q.shape
    words = None
    if biases is not None:
        each_row = rules.spec("batch", None, "act_heads", None)
        each_row = jnp.zeros((B, *biases.shape), out_sharding=each_row)
        biases = spread(biases.astype(jnp.float32), each_row)
    if key is not None and dropout_rate > 0.0:
        cut = rules.spec("batch", "act_heads", None, None)
        cut = NamedSharding(jax.sharding.get_abstract_mesh(), cut)
        words = words_of(key, (B, H, T, T), cut)
    rate = 0.0 if words is None else dropout_rate
    call = Call(N, causal, segments is not None, rate, interpret)

    def attend(q, k, v, biases, segments, words):
        flat = [
            None if x is None else x.reshape(*x.shape[:2], -1)
            for x in (q, k, v, biases)
        ]
        mixed: Any = attend_in_vmem(call, *flat, segments, words)
        return mixed.reshape(q.shape)

    return _on_each_device(attend, q, k, v, biases, segments, words, rules=rules)


def _on_each_device(
    kernel: Callable[..., Array],
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K N"],
    *others: Any,
    rules: Rules,
) -> Float[Array, "B T H N"]:
    """`kernel` on each device's rows and heads.

    others: None, or trees of what is [B T], [B H T], [B 3 H N], or the same for all.
    """
    mine = rules.spec("batch", "seq", "act_heads", None)
    if k.shape[2] != q.shape[2] and rules.act_kv_heads != rules.act_heads:
        # Fewer key-value heads than parts: each device takes those of its queries.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    by_dims = {
        1: rules.spec(None), 2: rules.spec("batch", "seq"),
        3: rules.spec("batch", "act_heads", None),
        4: rules.spec("batch", None, "act_heads", None),
    }  # fmt: skip
    specs = mine, mine, mine, *jax.tree.map(lambda x: by_dims[x.ndim], others)
    return jax.shard_map(
        kernel, in_specs=specs, out_specs=mine,
        check_vma=False,  # a Pallas kernel does not say over which axes it varies
    )(*jax.tree.map(jax.reshard, (q, k, v, *others), specs))  # fmt: skip
