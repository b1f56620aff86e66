# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders, in both directions: config.json, tokenizer, model.safetensors.

transformers reads and writes configs and tokenizers; the mathematics is our own, and
the weights pass through safetensors by the families' name tables.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm_scale.errors import InputError
from lm_scale.models import FAMILIES, Model, ModelConfig, family_of
from lm_scale.models.layers import HFWeight
from lm_scale.sharding import Params, declarations, flatten, unflatten

Tensors = Mapping[str, np.ndarray]


def export(config: ModelConfig, params: Params, tokenizer, folder: Path | str) -> None:
    """Writes a folder that `transformers.AutoModelFor...` and `AutoTokenizer` load.

    Weights are float32. Gathers the model on each host; process 0 writes.
    """
    from transformers import AutoConfig

    gathered = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() != 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(tokenizer, name) is not None
    }
    settings = {**ids, **config.to_hf(), "dtype": "float32"}
    AutoConfig.for_model(**settings).save_pretrained(folder)
    tokenizer.model_max_length = config.positions
    tokenizer.save_pretrained(folder)
    tensors = to_hf(config, gathered)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path | str) -> ModelConfig:
    """The model config of a Hugging Face folder; InputError if we lack the family."""
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {content!r:.40}")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable Hugging Face config: {error}"
        ) from error
    for family in FAMILIES:
        if family.hf_type == content.get("model_type"):
            return family.config.from_hf(_with_defaults(content))
    raise InputError(
        f"{path}: model_type {content.get('model_type')!r} is not supported. There "
        f"are: {', '.join(family.hf_type for family in FAMILIES)}."
    )


def _with_defaults(content: dict) -> dict:
    """A config.json may leave out what equals transformers' default."""
    from transformers import AutoConfig

    arguments = {name: x for name, x in content.items() if name != "model_type"}
    return AutoConfig.for_model(content["model_type"], **arguments).to_dict()


def read_params(folder: Path | str, model: Model) -> Params:
    """The parameters (float32 numpy) of a folder with `model.safetensors`.

    Sharded checkpoints (`model.safetensors.index.json`) are read as well. Raises
    InputError naming a missing tensor, or one of another shape.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{index} is not a readable index of safetensors files: {error!r}"
            ) from error
        files = sorted(set(weight_map.values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="numpy") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"Cannot read {folder / name}: {error}") from error
    return from_hf(model, tensors)


def to_hf(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Our parameters -> Hugging Face's tensors by name."""
    tensors = {}
    names = family_of(config).hf_names
    for path, value in flatten(params).items():
        value, entry = np.asarray(value, np.float32), names[path]
        blocks = value if path.startswith("blocks.") else value[None]
        for layer, block in enumerate(blocks):
            tensors |= _block_to_hf(entry, block, layer)
    return tensors


def _block_to_hf(entry: HFWeight, block: np.ndarray, layer: int) -> Tensors:
    several = len(entry.names) > 1
    parts = np.moveaxis(block, entry.stack_axis, 0) if several else block[None]
    tensors = {}
    for name, part in zip(entry.names, parts, strict=True):
        part = part.reshape(entry.matrix_shape(part.shape))
        part = part.T if entry.transpose else part
        tensors[name.format(layer=layer)] = np.ascontiguousarray(part)
    return tensors


def from_hf(model: Model, tensors: Tensors) -> Params:
    """Hugging Face's tensors -> our parameters, float32 numpy.

    Raises InputError naming a tensor that is missing or has another shape.
    """
    names = family_of(model.config).hf_names
    params = {}
    for path, weight in declarations(model).items():
        shape, entry = weight.get_value().shape, names[path]
        if path.startswith("blocks."):
            blocks = [
                _block_from_hf(entry, tensors, shape[1:], layer)
                for layer in range(shape[0])
            ]
            params[path] = np.stack(blocks)
        else:
            params[path] = _block_from_hf(entry, tensors, shape, 0)
    return unflatten(params)


def _block_from_hf(
    entry: HFWeight, tensors: Tensors, shape: tuple[int, ...], layer: int
) -> np.ndarray:
    axis, several = entry.stack_axis, len(entry.names) > 1
    part_shape = shape[:axis] + shape[axis + 1 :] if several else shape
    parts = []
    for name in entry.names:
        name = name.format(layer=layer)
        # Saved without its head, as `openai-community/gpt2`: no `transformer.`.
        tensor = tensors.get(name, tensors.get(name.partition(".")[2]))
        if tensor is None:
            raise InputError(f"The Hugging Face checkpoint has no tensor {name!r}.")
        tensor = np.asarray(tensor, np.float32)
        expected = entry.matrix_shape(part_shape)
        expected = expected[::-1] if entry.transpose else expected
        if tensor.shape != expected:
            raise InputError(
                f"Tensor {name!r} has shape {tensor.shape}, the model expects "
                f"{expected}. Does the config belong to these weights?"
            )
        tensor = tensor.T if entry.transpose else tensor
        parts.append(tensor.reshape(part_shape))
    return np.stack(parts, axis) if several else parts[0]
