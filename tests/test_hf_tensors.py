# SPDX-License-Identifier: Apache-2.0
"""What is read of Hugging Face's tensors: the right values, and no others."""

import math

import jax
import numpy as np
import parity
import pytest
from safetensors.numpy import save_file

from lm_scale import hf
from lm_scale.errors import InputError
from lm_scale.hf_tensors import read_part
from lm_scale.models import build_model, family_of
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.roberta import RobertaConfig
from lm_scale.sharding import MeshShape, declarations, flatten, make_mesh, unflatten
from lm_scale.weight_files import StoredTensor

SHAPE = {"vocab": 40, "positions": 16, "layers": 3, "embed": 16, "heads": 4, "mlp": 24}
OPTIONS = ("qkv_bias", "out_bias", "mlp_bias")
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE),
    "llama": LlamaConfig(
        **SHAPE, kv_heads=2, head_dim=6, **dict.fromkeys(OPTIONS, True)
    ),
    "roberta": RobertaConfig(**SHAPE | {"positions": 14}),  # and 2 rows more
}
MESHES = {
    "fsdp": MeshShape(data=1, fsdp=8),
    "replicas": MeshShape(data=4, fsdp=2),
    "2x2x2": MeshShape(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return build_model(CONFIGS[request.param], Compute())


def random_params(model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        path: rng.standard_normal(weight.get_value().shape, np.float32)
        for path, weight in declarations(model).items()
    }


class Counted:
    """An array that counts the elements which are taken of it."""

    def __init__(self, array):
        self.array, self.shape, self.taken = array, array.shape, 0

    def __getitem__(self, index):
        found = self.array[index]
        self.taken += found.size
        return found


def test_any_part_of_a_weight_is_read_and_nothing_else(model):
    """Cut at random on each axis: layers, q k v, heads, head_dim, the model's width."""
    params, rng = random_params(model), np.random.default_rng(1)
    whole = hf.to_hf(model.config, unflatten(params))
    names = family_of(model.config).hf_names
    for path, weight in params.items():
        for _ in range(8):
            tensors = {name: Counted(x) for name, x in whole.items()}
            part = []
            for size in weight.shape:
                start, stop = sorted(rng.choice(size + 1, 2, replace=False))
                cut = rng.random() < 0.6
                part.append((int(start), int(stop)) if cut else (0, size))
            found = read_part(path, names[path], tensors, weight.shape, tuple(part))
            expected = weight[tuple(slice(*ends) for ends in part)]
            np.testing.assert_array_equal(found, expected, err_msg=f"{path} {part}")
            assert sum(x.taken for x in tensors.values()) == expected.size, path


@pytest.fixture
def reads(monkeypatch):
    """Counts the elements that are read of safetensors files."""
    taken, read = [], StoredTensor.__getitem__

    def counted(self, index):
        found = read(self, index)
        taken.append(found.size)
        return found

    monkeypatch.setattr(StoredTensor, "__getitem__", counted)
    return taken


def write(folder, model, params):
    tensors = hf.to_hf(model.config, unflatten(params))
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_a_process_reads_each_value_once(tmp_path, model, shape, reads):
    """Whatever the number of devices that hold it."""
    write(tmp_path, model, params := random_params(model))
    found = flatten(hf.read_params(tmp_path, model, make_mesh(shape)))
    assert found.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert sum(reads) == sum(value.size for value in params.values())


def test_half_of_the_devices_read_half_of_the_weights(
    tmp_path, model, reads, monkeypatch
):
    """As a process would that has four of the eight devices."""
    write(tmp_path, model, params := random_params(model))
    mesh = make_mesh(MESHES["fsdp"])
    ours = set(list(mesh.devices.flat)[:4])

    def four_devices(shape, sharding, read):
        for device, index in sharding.devices_indices_map(shape).items():
            if device in ours:
                part = read(index)
                assert part.shape == sharding.shard_shape(shape)
        return sharding

    monkeypatch.setattr(jax, "make_array_from_callback", four_devices)
    shardings = flatten(hf.read_params(tmp_path, model, mesh))
    expected = sum(
        value.size if shardings[path].is_fully_replicated else value.size // 2
        for path, value in params.items()
    )
    assert sum(reads) == expected < 0.55 * sum(x.size for x in params.values())


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_wrong_tensors_are_found_before_a_value_is_read(tmp_path, model, reads, change):
    tensors = hf.to_hf(model.config, unflatten(random_params(model)))
    name = list(tensors)[-1]
    last = tensors.pop(name)
    if change == "shape":
        tensors[name] = np.ones(math.prod(last.shape) + 1, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=name):
        hf.read_params(tmp_path, model, parity.one_device())
    assert not reads
