# SPDX-License-Identifier: Apache-2.0
"""The same numbers as transformers in torch, and weights that pass both ways."""

import dataclasses

import numpy as np
import parity
import pytest

from lm_scale import hf
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer
from lm_scale.models import build_model
from lm_scale.models.compute import Compute
from lm_scale.sharding import flatten

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.live
FAMILIES = ("gpt2", "roberta")


def state_of(model) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in model.state_dict().items()}


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("case", parity.CASES)
def test_logits_loss_and_gradients(case):
    config, inputs = parity.CASES[case]
    tensors = parity.random_tensors(config)
    reference = parity.theirs(config, inputs, tensors)
    parity.assert_close(parity.ours(config, inputs, tensors), reference, inputs)
    tiny = {
        name
        for name, gradient in reference.gradients.items()
        if np.abs(gradient).max() < parity.SMALLEST
    }
    assert all("key.bias" in name for name in tiny)  # nothing else is let off


@pytest.mark.parametrize("case", parity.CASES)
def test_a_state_dict_comes_back_as_it_was(case):
    config, _ = parity.CASES[case]
    state = state_of(parity.torch_model(config))
    model = build_model(config, Compute())
    back = hf.to_hf(config, hf.from_hf(model, state))
    assert state.keys() - back.keys() <= parity.TIED
    assert_bit_equal(back, {name: state[name] for name in back})


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """An exported folder and what went into it."""
    config, inputs = parity.CASES[request.param]
    texts = ["a small text for a small tokenizer\n"] * 3
    settings = TokenizerConfig(vocab_size=265, kind=request.param)
    tokenizer = train_tokenizer(texts, settings, max_length=config.positions)
    config = dataclasses.replace(config, vocab=267)  # rows to spare
    tensors = parity.random_tensors(config)
    model = build_model(config, Compute())
    params = parity.placed(model, tensors, parity.one_device())
    folder = tmp_path_factory.mktemp("exported") / "nested" / "folder"
    hf.export(config, params, tokenizer, folder)
    return folder, config, inputs, tensors, tokenizer


def test_transformers_loads_what_we_export(exported):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    folder, config, inputs, tensors, _ = exported
    is_gpt2 = config.to_hf()["model_type"] == "gpt2"
    auto = AutoModelForCausalLM if is_gpt2 else AutoModelForMaskedLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    problems = {name: x for name, x in info.items() if x}
    assert not problems  # missing, unexpected or mismatched keys
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(inputs.tokens).long()).logits.numpy()
    result = parity.ours(config, inputs, tensors)
    assert parity.relative_error(result.logits, logits) < parity.TOLERANCE


def test_an_exported_tokenizer_and_config_agree(exported):
    from transformers import AutoConfig, AutoTokenizer

    folder, config, _, _, tokenizer = exported
    loaded, settings = (x.from_pretrained(folder) for x in (AutoTokenizer, AutoConfig))
    for text in ("a small text", "odd Ω text"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(settings, name) == getattr(loaded, name)
    assert settings.dtype in (torch.float32, "float32")
    assert hf.read_config(folder) == config


@pytest.mark.parametrize("shard", ["5GB", "5KB"])
@pytest.mark.parametrize("case", ["gpt2", "roberta-masked"])
def test_we_load_what_transformers_saves(tmp_path, case, shard):
    config, _ = parity.CASES[case]
    saved = parity.torch_model(config)
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    is_sharded = shard == "5KB"
    assert (tmp_path / "model.safetensors.index.json").exists() == is_sharded
    read = hf.read_config(tmp_path)
    assert read == config
    model = build_model(read, Compute())
    params = hf.read_params(tmp_path, model, parity.one_device())
    expected = hf.from_hf(model, state_of(saved))
    assert_bit_equal(flatten(params), flatten(expected))
