# SPDX-License-Identifier: Apache-2.0
"""One computation, ours and transformers': logits, loss and every weight's gradient.

Weights and gradients go by their Hugging Face names, so that a wrong name or layout in
a family's table shows as a wrong number. All in float32, without dropout.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lm_scale import hf
from lm_scale.losses import IGNORE, training_loss
from lm_scale.models import Model, ModelConfig, build_model, family_of
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.roberta import RobertaConfig
from lm_scale.models.rotary import FrequencyScaling
from lm_scale.sharding import (
    MeshShape,
    Params,
    Rules,
    abstract_params,
    make_mesh,
    map_declarations,
)

TOLERANCE = 1e-4  # largest difference / largest reference value, tensor by tensor
# ... but no tensor counts as smaller than this: the gradient of RoBERTa's key bias is
# zero but for rounding, as a softmax does not notice it.
SMALLEST = 1e-3


@dataclass(frozen=True)
class Inputs:
    """What both models are given, int32 [B T]."""

    tokens: np.ndarray
    labels: np.ndarray  # as transformers takes them: not shifted, -100 is left out
    positions: np.ndarray | None = None  # None: the model's own
    segments: np.ndarray | None = None  # None: one document a row, all of it seen


@dataclass(frozen=True)
class Result:
    logits: np.ndarray  # [B T V]
    loss: np.ndarray  # mean over the labels, nats
    gradients: dict[str, np.ndarray]  # by Hugging Face name


def random_inputs(vocab, shape, seed, *, pads=(), pad_id=0, **more) -> Inputs:
    """Tokens without padding but at `pads` (row, column); 3 labels of 10 left out."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(pad_id + 1, vocab, shape, np.int32)
    labels = rng.integers(0, vocab, shape, np.int32)
    labels[rng.random(shape) < 0.3] = IGNORE
    for row, column in pads:
        tokens[row, column], labels[row, column] = pad_id, IGNORE
    return Inputs(tokens, labels, **more)


def starts_at(starts, shape) -> dict[str, np.ndarray]:
    """Segments 1, 2 ... of a row, split at its `starts`; positions restart at each."""
    begins = np.zeros(shape, np.int32)
    for row, columns in enumerate(starts):
        begins[row, [0, *columns]] = 1
    columns = np.arange(shape[1], dtype=np.int32)
    start = np.maximum.accumulate(begins * columns, axis=1)
    return {
        "segments": np.cumsum(begins, axis=1, dtype=np.int32),
        "positions": columns - start,
    }


def _not_at(pads, shape):
    segments = np.ones(shape, np.int32)
    segments[tuple(zip(*pads, strict=True))] = 0
    return segments


_PADS = [(0, 3), (0, 9), (0, 10), (1, 0), (1, 6)]
CASES: dict[str, tuple[ModelConfig, Inputs]] = {
    "gpt2": (
        GPT2Config(vocab=37, positions=14, layers=2, embed=12, heads=3, mlp=20),
        random_inputs(37, (2, 11), seed=1),
    ),
    "gpt2-packed": (
        GPT2Config(
            vocab=29, positions=9, layers=3, embed=10, heads=2, mlp=40,
            norm_epsilon=1e-3,
        ),
        random_inputs(29, (2, 9), seed=2, **starts_at([[4], [1, 6]], (2, 9))),
    ),
    # Padding is seen here; it only stops the count of positions.
    "roberta": (
        RobertaConfig(vocab=37, positions=13, layers=2, embed=12, heads=3, mlp=20),
        random_inputs(37, (2, 11), seed=3, pads=_PADS, pad_id=1),
    ),
    "roberta-masked": (
        RobertaConfig(
            vocab=31, positions=11, layers=2, embed=10, heads=2, mlp=18,
            token_types=2, pad_id=3, norm_epsilon=1e-3,
        ),
        random_inputs(
            31, (2, 11), seed=4, pads=_PADS, pad_id=3,
            segments=_not_at(_PADS, (2, 11)),
        ),
    ),
    "roberta-packed": (
        RobertaConfig(
            vocab=23, positions=7, layers=1, embed=8, heads=1, mlp=10, pad_id=0
        ),
        random_inputs(23, (2, 7), seed=5, **starts_at([[3], [5]], (2, 7))),
    ),
    # Grouped queries, an output of its own, Llama 3.1's frequencies.
    "llama": (
        LlamaConfig(
            vocab=37, positions=64, layers=2, embed=12, heads=6, kv_heads=2, head_dim=4,
            mlp=20, rope_theta=500.0,
            rope_scaling=FrequencyScaling(factor=4.0, original=16),
        ),
        random_inputs(37, (2, 11), seed=6),
    ),
    "llama-packed": (
        LlamaConfig(
            vocab=29, positions=9, layers=1, embed=8, heads=2, kv_heads=2, head_dim=6,
            mlp=10, qkv_bias=True, out_bias=True, mlp_bias=True, tied=True,
            rope_scaling=FrequencyScaling("linear", factor=2.0),
        ),
        random_inputs(29, (2, 9), seed=7, **starts_at([[4], [1, 6]], (2, 9))),
    ),
    "mistral": (
        LlamaConfig(
            kind="mistral", vocab=31, positions=16, layers=2, embed=12, heads=4,
            kv_heads=1, head_dim=2, mlp=18, window=4, norm_epsilon=1e-3,
        ),
        random_inputs(31, (2, 11), seed=8),
    ),
    "qwen2": (
        LlamaConfig(
            kind="qwen2", vocab=31, positions=16, layers=2, embed=12, heads=6,
            kv_heads=3, head_dim=2, mlp=18, qkv_bias=True, tied=True,
        ),
        random_inputs(31, (2, 11), seed=9),
    ),
    "qwen3": (
        LlamaConfig(
            kind="qwen3", vocab=31, positions=16, layers=2, embed=12, heads=4,
            kv_heads=2, head_dim=8, mlp=18, qk_norm=True, window=5,
        ),
        random_inputs(31, (2, 11), seed=10),
    ),
}  # fmt: skip


def random_tensors(config: ModelConfig, spread: float = 0.3) -> hf.Tensors:
    """Weights by Hugging Face name, none of them trivial: biases and norms as well.

    Multiples of 1/64, which compress well.
    """
    declared = build_model(config, Compute(dtype="float32"))
    shapes = map_declarations(declared, lambda _, w: np.zeros(w.get_value().shape))
    tensors = {}
    for name, empty in hf.to_hf(config, shapes).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        is_scale = empty.ndim == 1 and name.endswith("weight")
        value = float(is_scale) + spread * rng.standard_normal(empty.shape)
        tensors[name] = np.float32(np.round(value * 64) / 64)
    return tensors


def ours(config: ModelConfig, inputs: Inputs, tensors: hf.Tensors) -> Result:
    """What lm_scale computes, on one device."""
    model = build_model(config, Compute(dtype="float32", loss_chunk=4))
    graphdef = nnx.split(model)[0]
    labels = shifted(inputs.labels) if family_of(config).causal else inputs.labels

    @jax.jit
    def run(params, tokens, labels, positions, segments):
        def loss_and_logits(params):
            model = nnx.merge(graphdef, params)
            hidden = model(tokens, positions=positions, segments=segments)
            loss, _ = training_loss(
                model.head, hidden, labels, chunk=model.compute.loss_chunk
            )
            return loss / jnp.sum(labels != IGNORE), model.head(hidden)

        return jax.value_and_grad(loss_and_logits, has_aux=True)(params)

    with jax.set_mesh(mesh := one_device()):
        params = placed(model, tensors, mesh)
        given = (inputs.tokens, labels, inputs.positions, inputs.segments)
        (loss, logits), gradients = run(params, *place_rows(given, mesh))
    gradients = hf.to_hf(config, jax.device_get(gradients))
    return Result(np.asarray(logits), np.asarray(loss), gradients)


def one_device() -> Mesh:
    return make_mesh(MeshShape(), jax.devices()[:1])


def load(folder: Path, mesh: Mesh) -> tuple[Model, Params]:
    """The float32 model of a Hugging Face folder; call it under `jax.set_mesh`."""
    model = build_model(hf.read_config(folder), Compute(dtype="float32"))
    return model, hf.read_params(folder, model, mesh)


def placed(model: Model, tensors: hf.Tensors, mesh: Mesh) -> Params:
    """The parameters, as a checkpoint would put them on the mesh."""
    params = hf.from_hf(model, tensors)
    targets = abstract_params(model, model.compute.rules, mesh)
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, targets)


def place_rows(rows, mesh: Mesh):
    """A tree of arrays [B T], as the loader puts them on the mesh."""
    sharding = NamedSharding(mesh, Rules().spec("batch", "seq"))
    return jax.device_put(rows, sharding)


def shifted(labels: np.ndarray) -> np.ndarray:
    """transformers' causal models compare position t with label t + 1."""
    last = np.full_like(labels[:, :1], IGNORE)
    return np.concatenate([labels[:, 1:], last], axis=1)


def theirs(config: ModelConfig, inputs: Inputs, tensors: hf.Tensors) -> Result:
    """What transformers computes in torch."""
    import torch

    model = torch_model(config, tensors)
    # torch gives the embedding of padding no gradient; we do, as Flax does. It matters
    # only where padding is seen.
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    given = {"input_ids": inputs.tokens, "labels": inputs.labels}
    if inputs.positions is not None:
        first = getattr(config, "pad_id", -1) + 1  # RoBERTa's table begins there
        given["position_ids"] = inputs.positions + np.int32(first)
    given = {name: torch.from_numpy(x).long() for name, x in given.items()}
    if inputs.segments is not None:
        mask = torch.from_numpy(attention_mask(config, inputs.segments))
        given["attention_mask"] = mask
    output = model(**given)
    output.loss.backward()
    gradients = {name: w.grad.numpy() for name, w in model.named_parameters()}
    return Result(
        output.logits.detach().numpy(), output.loss.detach().numpy(), gradients
    )


def torch_model(config: ModelConfig, tensors: hf.Tensors | None = None):
    """transformers' model, in evaluation mode; without `tensors`, of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM
    torch.manual_seed(0)
    model = auto.from_config(
        AutoConfig.for_model(**config.to_hf()), attn_implementation="eager"
    )
    if tensors is not None:
        tensors = {name: torch.from_numpy(x) for name, x in tensors.items()}
        absent, unknown = model.load_state_dict(tensors, strict=False)
        assert not unknown and set(absent) <= TIED, (absent, unknown)
    return model.eval()


# Names of one weight under two names, of which we keep the other.
TIED = {"lm_head.weight", "lm_head.decoder.weight", "lm_head.decoder.bias"}


def attention_mask(config: ModelConfig, segments: np.ndarray) -> np.ndarray:
    """What transformers takes: [B T], or added to the scores [B 1 T T] if packed."""
    if set(np.unique(segments)) <= {0, 1}:  # 0 is padding
        return segments.astype(np.int64)
    seen = segments[:, None, :, None] == segments[:, None, None, :]
    if family_of(config).causal:
        seen = np.tril(seen)
    return np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)


def assert_close(result: Result, reference: Result, inputs: Inputs) -> None:
    """Every tensor agrees within TOLERANCE.

    Logits of padding are left out: there, who sees whom is a matter of taste.
    """
    real = np.ones_like(inputs.tokens, bool)
    if inputs.segments is not None:
        real = inputs.segments != 0
    pairs = {
        "logits": (result.logits[real], reference.logits[real]),
        "loss": (result.loss, reference.loss),
    }
    assert result.gradients.keys() == reference.gradients.keys()
    for name, gradient in reference.gradients.items():
        pairs[f"gradient of {name}"] = (result.gradients[name], gradient)
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong, wrong


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    assert value.shape == reference.shape
    scale = max(np.abs(reference).max(), SMALLEST)
    return float(np.abs(value - reference).max() / scale)
