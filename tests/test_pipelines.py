# SPDX-License-Identifier: Apache-2.0
"""What a user of transformers does with an exported folder: load, ask, save again."""

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import parity
import pytest

from lm_scale import hf
from lm_scale.data.tokenizer import (
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from lm_scale.generate import Sampling, complete, generate
from lm_scale.losses import IGNORE
from lm_scale.models import ModelConfig, build_model, family_of
from lm_scale.models.compute import Compute
from lm_scale.sharding import flatten

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.live
PROMPT = "a small"
MASKED = "a small <mask> for a tokenizer"


@dataclass(frozen=True)
class Exported:
    folder: Path
    config: ModelConfig
    tensors: hf.Tensors  # what went into it

    @property
    def model(self):
        return build_model(self.config, Compute(dtype="float32"))


def exported_of(family, folder) -> Exported:
    config = replace(parity.CASES[family][0], vocab=283, positions=25)
    texts = ["a small text for a small tokenizer\n"] * 3
    kind = "roberta" if family == "roberta" else "gpt2"
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=270, kind=kind))
    tensors = parity.random_tensors(config)
    model = build_model(config, Compute())
    params = parity.placed(model, tensors, parity.one_device())
    hf.export(config, params, tokenizer, folder)
    return Exported(folder, config, tensors)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return exported_of("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return exported_of("roberta", tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return exported_of("mistral", tmp_path_factory.mktemp("mistral"))


@pytest.fixture(params=["gpt2", "mistral", "roberta"])
def exported(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["gpt2", "mistral"])
def causal(request):
    return request.getfixturevalue(request.param)


def auto_class(exported):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    is_causal = family_of(exported.config).causal
    return AutoModelForCausalLM if is_causal else AutoModelForMaskedLM


@contextmanager
def silence():
    """Fails if transformers logs a warning, or anyone gives one."""
    logger, said = logging.getLogger("transformers"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert said == []


# --- Weights --------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 9_000], ids=["one file", "several"])
def test_weights_pass_through_transformers_bit_for_bit(
    exported, tmp_path, monkeypatch, most
):
    folder = exported.folder
    if most is not None:
        monkeypatch.setattr("lm_scale.hf_shards.MAX_SHARD", most)
        params = parity.placed(exported.model, exported.tensors, parity.one_device())
        tokenizer = load_tokenizer(folder)
        hf.export(exported.config, params, tokenizer, folder := tmp_path / "several")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    with silence():
        auto_class(exported).from_pretrained(folder).save_pretrained(tmp_path)
    assert hf.read_config(tmp_path) == exported.config
    back = flatten(hf.read_params(tmp_path, exported.model, parity.one_device()))
    ours = flatten(hf.from_hf(exported.model, exported.tensors))
    assert back.keys() == ours.keys()
    for name, x in ours.items():
        assert back[name].dtype == x.dtype == np.float32
        np.testing.assert_array_equal(back[name], x, err_msg=name)


# --- Tokenizers -----------------------------------------------------------------------


def test_the_tokenizer_of_roberta(roberta):
    from transformers import AutoTokenizer

    with silence():
        tokenizer = AutoTokenizer.from_pretrained(roberta.folder)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a small")["input_ids"])
    assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
    assert len(tokens) > 2
    pair = tokenizer.convert_ids_to_tokens(tokenizer("a", "a")["input_ids"])
    assert pair == ["<s>", "a", "</s>", "</s>", "a", "</s>"]
    specials = ("<s>", "</s>", "</s>", "<s>", "<pad>", "<unk>", "<mask>")
    roles = ("bos", "eos", "sep", "cls", "pad", "unk", "mask")
    assert specials == tuple(getattr(tokenizer, f"{role}_token") for role in roles)
    assert set(tokenizer.all_special_tokens) == set(specials)
    assert tokenizer("a <mask>")["input_ids"].count(tokenizer.mask_token_id) == 1
    assert tokenizer.model_max_length == roberta.config.positions


def test_the_tokenizer_of_gpt2(gpt2):
    from transformers import AutoTokenizer

    with silence():
        tokenizer = AutoTokenizer.from_pretrained(gpt2.folder)
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    ids = tokenizer("a small<|endoftext|>")["input_ids"]
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a small"
    assert tokenizer.model_max_length == gpt2.config.positions


def test_a_text_that_is_too_long_is_cut_to_what_the_model_can_read(exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    batch = tokenizer("odd Ω text " * 20, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, exported.config.positions)
    model = auto_class(exported).from_pretrained(exported.folder)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (1, exported.config.positions, exported.config.vocab)


# --- Pipelines ------------------------------------------------------------------------


def test_fill_mask_gives_our_probabilities(roberta):
    from transformers import pipeline

    with silence():
        pipe = pipeline("fill-mask", model=str(roberta.folder))
        answers = pipe(MASKED)
    ids = np.array([pipe.tokenizer(MASKED)["input_ids"]], np.int32)
    inputs = parity.Inputs(ids, np.full_like(ids, IGNORE))
    logits = parity.ours(roberta.config, inputs, roberta.tensors).logits
    ours = np.asarray(jax.nn.softmax(logits[ids == pipe.tokenizer.mask_token_id][0]))
    likeliest = np.argsort(-ours)[: len(answers)]
    assert [answer["token"] for answer in answers] == likeliest.tolist()
    scores = [answer["score"] for answer in answers]
    np.testing.assert_allclose(scores, ours[likeliest], rtol=1e-4)
    assert answers[0]["sequence"] == on_one_device(
        roberta, lambda params: complete(
            roberta.model, params, pipe.tokenizer, MASKED, Sampling()
        )
    )[0]  # fmt: skip


def on_one_device(exported, call):
    with jax.set_mesh(mesh := parity.one_device()):
        return call(parity.placed(exported.model, exported.tensors, mesh))


def test_text_generation_continues_as_we_do(causal):
    from transformers import pipeline

    with silence():
        pipe = pipeline("text-generation", model=str(causal.folder))
    prompt = np.array([pipe.tokenizer(PROMPT)["input_ids"]], np.int32)
    room = causal.config.positions - prompt.shape[1]
    greedy = Sampling(max_new_tokens=room, temperature=0)
    eos = pipe.tokenizer.eos_token_id
    (ours,) = on_one_device(
        causal,
        lambda params: generate(causal.model, params, prompt, greedy, eos_id=eos),
    ).tolist()
    with silence():
        (answer,) = pipe(PROMPT, do_sample=False, return_tensors=True)
        (text,) = pipe(PROMPT, do_sample=False)
    theirs = answer["generated_token_ids"]
    assert len(set(theirs)) > 3  # not one token again and again
    assert theirs == ours[: len(theirs)]
    assert set(ours[len(theirs) :]) <= {eos}
    assert text["generated_text"] == pipe.tokenizer.decode(
        ours, skip_special_tokens=True
    )


def test_text_generation_without_arguments_stays_within_the_positions(causal):
    """The pipeline's own default, 256 new tokens, would run over the table."""
    from transformers import pipeline

    pipe = pipeline("text-generation", model=str(causal.folder))
    with silence():
        (answer,) = pipe(PROMPT, return_tensors=True)
    assert 2 < len(answer["generated_token_ids"]) <= causal.config.positions


def test_training_goes_on_in_transformers(exported):
    """A loss and its gradient, from the exported folder."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(exported.folder)(PROMPT, return_tensors="pt")
    model = auto_class(exported).from_pretrained(exported.folder)
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
