# SPDX-License-Identifier: Apache-2.0
"""Weights that the old Flax scripts left: `flax_model.msgpack`, whole and in parts.

The files are built from what transformers' Flax modules called their parameters and how
these kept them, written down here once more: FLAX knows nothing of the package's own
tables.
"""

import inspect
import json
import os
import pickle
import re

import ml_dtypes
import msgpack
import numpy as np
import parity
import pytest
from flax import serialization
from flax.serialization import msgpack_serialize, to_bytes
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from lm_scale import hf
from lm_scale.errors import InputError
from lm_scale.models import build_model
from lm_scale.models.compute import Compute
from lm_scale.sharding import flatten
from lm_scale.weight_files import check_weights, open_tensors

# torch's name -> Flax's path, and how a Flax array is made of torch's.
DENSE, CONV1D = (lambda x: x.T), (lambda x: x.T)  # (in, out), and (out, in) for Conv1D
SAME = np.asarray
FLAX = {
    "gpt2": [
        (r"transformer\.(wte|wpe)\.weight", r"transformer/\1/embedding", SAME),
        (
            r"transformer\.h\.(\d+)\.(ln_[12])\.weight",
            r"transformer/h/\1/\2/scale",
            SAME,
        ),
        (r"transformer\.h\.(\d+)\.(ln_[12])\.bias", r"transformer/h/\1/\2/bias", SAME),
        (r"transformer\.ln_f\.weight", "transformer/ln_f/scale", SAME),
        (r"transformer\.ln_f\.bias", "transformer/ln_f/bias", SAME),
        (
            r"transformer\.h\.(\d+)\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.weight",
            r"transformer/h/\1/\2/\3/kernel",
            CONV1D,
        ),
        (
            r"transformer\.h\.(\d+)\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.bias",
            r"transformer/h/\1/\2/\3/bias",
            SAME,
        ),
    ],
    "roberta": [
        (
            r"roberta\.embeddings\.(word|position|token_type)_embeddings\.weight",
            r"roberta/embeddings/\1_embeddings/embedding",
            SAME,
        ),
        (
            r"roberta\.embeddings\.LayerNorm\.weight",
            "roberta/embeddings/LayerNorm/scale",
            SAME,
        ),
        (
            r"roberta\.embeddings\.LayerNorm\.bias",
            "roberta/embeddings/LayerNorm/bias",
            SAME,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.weight",
            r"roberta/encoder/layer/\1/attention/self/\2/kernel",
            DENSE,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.bias",
            r"roberta/encoder/layer/\1/attention/self/\2/bias",
            SAME,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.attention\.output\.dense\.weight",
            r"roberta/encoder/layer/\1/attention/output/dense/kernel",
            DENSE,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.(intermediate|output)\.dense\.weight",
            r"roberta/encoder/layer/\1/\2/dense/kernel",
            DENSE,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.attention\.output\.dense\.bias",
            r"roberta/encoder/layer/\1/attention/output/dense/bias",
            SAME,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.(intermediate|output)\.dense\.bias",
            r"roberta/encoder/layer/\1/\2/dense/bias",
            SAME,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.weight",
            r"roberta/encoder/layer/\1/attention/output/LayerNorm/scale",
            SAME,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.bias",
            r"roberta/encoder/layer/\1/attention/output/LayerNorm/bias",
            SAME,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.output\.LayerNorm\.weight",
            r"roberta/encoder/layer/\1/output/LayerNorm/scale",
            SAME,
        ),
        (
            r"roberta\.encoder\.layer\.(\d+)\.output\.LayerNorm\.bias",
            r"roberta/encoder/layer/\1/output/LayerNorm/bias",
            SAME,
        ),
        (r"lm_head\.dense\.weight", "lm_head/dense/kernel", DENSE),
        (r"lm_head\.dense\.bias", "lm_head/dense/bias", SAME),
        (r"lm_head\.layer_norm\.weight", "lm_head/layer_norm/scale", SAME),
        (r"lm_head\.layer_norm\.bias", "lm_head/layer_norm/bias", SAME),
        (r"lm_head\.bias", "lm_head/bias", SAME),
    ],
}
FAMILIES = list(FLAX)
TIED = ("lm_head.weight", "lm_head.decoder.weight", "lm_head.decoder.bias")


def config_of(family):
    return parity.CASES[family][0]


def model_of(family):
    return build_model(config_of(family), Compute())


def read_params(folder, family):
    return hf.read_params(folder, model_of(family), parity.one_device())


def as_flax(family, tensors):
    """The parameters as a transformers Flax model held them, by "a/b/c" paths."""
    flat = {}
    for name, x in tensors.items():
        (found,) = [
            (re.sub(pattern, path, name), change(x))
            for pattern, path, change in FLAX[family]
            if re.fullmatch(pattern, name)
        ]
        flat[found[0]] = np.ascontiguousarray(found[1])
    assert len(flat) == len(tensors)
    return flat


def write_flax(path, flat):
    path.write_bytes(to_bytes(unflatten_dict(flat, sep="/")))


def expected_of(family, tensors):
    return flatten(hf.from_hf(model_of(family), tensors))


def assert_read_as(folder, family, expected):
    read = flatten(read_params(folder, family))
    assert read.keys() == expected.keys()
    for name, x in expected.items():
        assert read[name].dtype == x.dtype == np.float32
        np.testing.assert_array_equal(read[name], x, err_msg=name)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tensors(family):
    return parity.random_tensors(config_of(family))


# --- Against transformers -------------------------------------------------------------


@pytest.mark.live
def test_flax_weights_of_a_torch_model_are_read_as_its_safetensors(tmp_path, family):
    pytest.importorskip("torch")
    model = parity.torch_model(config_of(family))
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    state = {name: x for name, x in state.items() if name not in TIED}
    (tmp_path / "flax").mkdir()
    write_flax(tmp_path / "flax" / "flax_model.msgpack", as_flax(family, state))
    model.save_pretrained(tmp_path / "torch")
    expected = flatten(read_params(tmp_path / "torch", family))
    assert_read_as(tmp_path / "flax", family, expected)


# --- Forms of the file ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_each_float_type_becomes_float32(tmp_path, family, tensors, dtype):
    tensors = {name: x.astype(dtype) for name, x in tensors.items()}
    write_flax(tmp_path / "flax_model.msgpack", as_flax(family, tensors))
    assert_read_as(tmp_path, family, expected_of(family, tensors))


def test_several_files_with_an_index(tmp_path, family, tensors):
    """As `save_pretrained(max_shard_size=...)` wrote them."""
    flat = as_flax(family, tensors)
    weight_map = {}
    for number, part in enumerate((sorted(flat)[::2], sorted(flat)[1::2]), start=1):
        file = f"flax_model-{number:05d}-of-00002.msgpack"
        write_flax(tmp_path / file, {path: flat[path] for path in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    assert_read_as(tmp_path, family, expected_of(family, tensors))
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match=file):
        read_params(tmp_path, family)


def test_large_arrays_come_in_chunks(tmp_path, family, tensors, monkeypatch):
    """flax cuts arrays above 1 GiB; here, above 64 bytes."""
    monkeypatch.setattr("flax.serialization.MAX_CHUNK_SIZE", 64)
    write_flax(tmp_path / "flax_model.msgpack", as_flax(family, tensors))
    monkeypatch.undo()
    assert (
        b"__msgpack_chunked_array__" in (tmp_path / "flax_model.msgpack").read_bytes()
    )
    assert_read_as(tmp_path, family, expected_of(family, tensors))


def test_gpt2_without_its_base_prefix(tmp_path):
    """FlaxGPT2Model: all that its LM model has, as the head is the embedding."""
    tensors = parity.random_tensors(config_of("gpt2"))
    flat = as_flax("gpt2", tensors)
    bare = {path.removeprefix("transformer/"): x for path, x in flat.items()}
    write_flax(tmp_path / "flax_model.msgpack", bare)
    assert_read_as(tmp_path, "gpt2", expected_of("gpt2", tensors))


def test_roberta_without_its_head_is_refused(tmp_path):
    """A new head would have to be trained; it is not made up silently."""
    flat = as_flax("roberta", parity.random_tensors(config_of("roberta")))
    bare = {
        p.removeprefix("roberta/"): x for p, x in flat.items() if "lm_head" not in p
    }
    write_flax(tmp_path / "flax_model.msgpack", bare)
    with pytest.raises(InputError, match=r"lm_head\.dense\.weight.*head"):
        read_params(tmp_path, "roberta")


def test_what_is_no_weight_of_the_model_is_left_out(tmp_path, family, tensors):
    extra = {
        "pooler/dense/kernel": np.ones((3, 3), np.float32),
        "lm_head/decoder/kernel": np.ones((3, 3), np.float32),
        "step": 7,
        "counts": np.arange(3),
        "nothing": {},
    }
    write_flax(tmp_path / "flax_model.msgpack", as_flax(family, tensors) | extra)
    assert_read_as(tmp_path, family, expected_of(family, tensors))


def test_safetensors_go_first(tmp_path, family, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = {name: x + 1 for name, x in tensors.items()}
    write_flax(tmp_path / "flax_model.msgpack", as_flax(family, other))
    assert_read_as(tmp_path, family, expected_of(family, tensors))


@pytest.mark.parametrize("names", [[], ["pytorch_model.bin"], ["a.safetensors"]])
def test_missing_weights_are_refused_before_reading(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps({}))
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="has neither") as early:
            check_weights(folder)
        with pytest.raises(InputError) as late:
            open_tensors(folder)
        assert str(early.value) == str(late.value)
    with pytest.raises(InputError) as caught:
        check_weights(tmp_path)
    assert ("never loaded" in str(caught.value)) == (names == ["pytorch_model.bin"])


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_weights_that_are_there_are_not_opened(tmp_path, name):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / name).write_bytes(b"damaged")
    check_weights(tmp_path / "whole")
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part"}}))
    check_weights(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match="is not a readable index"):
        check_weights(tmp_path)


# --- Damage, and malice ---------------------------------------------------------------


def serialized():
    config = config_of("gpt2")
    flat = as_flax("gpt2", parity.random_tensors(config))
    return msgpack_serialize(unflatten_dict(flat, sep="/"))


def array_of(dtype_name, data=b"12345678"):
    """A flax array extension (code 1), packed by hand."""
    return msgpack.ExtType(1, msgpack.packb(((1,), dtype_name, data)))


DAMAGED = {
    "empty": lambda: b"",
    "cut": lambda: serialized()[:-100],
    "cut early": lambda: serialized()[:7],
    "more behind": lambda: serialized() + b"x",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\n",
    "no tree": lambda: msgpack.packb(7),
    "a number for a name": lambda: msgpack.packb({1: {2: 3}}),
    "a list for a name": lambda: b"\x81\x90\x01",
    "an object array": lambda: msgpack.packb({"a": array_of("object")}),
    "an unknown dtype": lambda: msgpack.packb({"a": array_of("quad(")}),
    "too few bytes": lambda: msgpack.packb({"a": array_of("float64", b"123")}),
    "no array": lambda: msgpack.packb({"a": msgpack.ExtType(1, b"\x07")}),
    "chunks missing": lambda: msgpack.packb({"__msgpack_chunked_array__": True}),
    "too deep": lambda: b"\x81\xa1a" * 3000 + b"\x01",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, damage):
    (tmp_path / "flax_model.msgpack").write_bytes(DAMAGED[damage]())
    with pytest.raises(InputError, match="flax_model.msgpack") as caught:
        read_params(tmp_path, "gpt2")
    assert "\n" not in str(caught.value)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_the_file_is_not_run(tmp_path):
    exploded = tmp_path / "exploded"
    content = pickle.dumps(Bomb(exploded))
    pickle.loads(content)
    exploded.rmdir()  # so much for the bomb
    for packed in (
        content,
        msgpack.packb({"a": content}),
        msgpack.packb({"a": array_of("object", content)}),
        *(msgpack.packb({"a": msgpack.ExtType(n, content)}) for n in range(128)),
    ):
        (tmp_path / "flax_model.msgpack").write_bytes(packed)
        with pytest.raises(InputError):
            read_params(tmp_path, "gpt2")
    assert not exploded.exists()


def test_the_flax_that_is_installed_has_no_way_to_run_code():
    """What the reader says of flax's source; a newer flax has to be read again."""
    source = inspect.getsource(serialization)
    assert not re.search(r"pickle|marshal|\beval\(|\bexec\(|import_?module", source)
