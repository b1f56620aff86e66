# SPDX-License-Identifier: Apache-2.0
"""Real RoBERTa weights for tests: Sapiens, a language model of antibody sequences.

PyPI package `sapiens` 1.0.2 (MIT licence; Prihoda et al. 2022, "BioPhi"): one model for
heavy chains, one for light, trained with fairseq. Its weights lie in pickles, which can
run code when they are opened. So they are read here, in test code only, by an unpickler
that knows five harmless names and refuses the rest.
"""

import argparse
import collections
import json
import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pypi import unpacked_wheel
from safetensors.numpy import save_file

from lm_scale.objectives import Vocabulary

MODELS = ("vh", "vl")  # variable domains of the heavy and of the light chain
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as fairseq has them
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"  # dict.txt
SYMBOLS = (*SPECIAL, *RESIDUES, "<mask>")
MASK = SYMBOLS.index("<mask>")
VOCABULARY = Vocabulary(size=len(SYMBOLS), special_ids=(0, 1, 2, 3, MASK), mask_id=MASK)
# Trastuzumab, an antibody in clinical use.
CHAINS = {
    "vh": "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSK"
    "NTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "vl": "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTIS"
    "SLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
}


def encode(chain: str) -> np.ndarray:
    """<s> residues </s>, int32 [T]: as the package feeds its models."""
    return np.array([SYMBOLS.index(x) for x in ("<s>", *chain, "</s>")], np.int32)


def download(folder: Path) -> Path:
    """The unpacked wheel; OSError if pip cannot get it."""
    return unpacked_wheel("sapiens==1.0.2", folder)


# --- The pickle -----------------------------------------------------------------------


class Settings(argparse.Namespace):
    """Stands for the `argparse.Namespace` of training options; nothing reads it."""


def _tensor(storage: np.ndarray, offset: int, shape, strides, *_) -> np.ndarray:
    """Stands for `torch._utils._rebuild_tensor_v2`: a view of a flat array."""
    size = math.prod(shape)
    view = storage[offset : offset + size].reshape(shape)
    found = tuple(n * view.itemsize for n in strides)
    if view.size and found != view.strides:
        raise pickle.UnpicklingError(f"strides {strides} of a tensor {shape}")
    return view


ALLOWED = {
    ("argparse", "Namespace"): Settings,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "FloatStorage"): np.dtype("<f4"),  # as `persistent_load` is given it
    ("torch", "DoubleStorage"): np.dtype("<f8"),
}


class RestrictedUnpickler(pickle.Unpickler):
    """Makes plain values and the ALLOWED; UnpicklingError for any other name."""

    def __init__(self, file: BinaryIO, most: int = 0):
        super().__init__(file)
        self.most = most  # bytes that the file can hold
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not on the list")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage by its key: an empty array, which `read_checkpoint` fills."""
        kind, dtype, key, _, count, view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or view is not None:
            raise pickle.UnpicklingError(f"persistent id {pid!r}")
        if not 0 <= count * dtype.itemsize <= self.most:
            raise pickle.UnpicklingError(f"storage of {count} numbers in a small file")
        return self.storages.setdefault(key, np.zeros(count, dtype))


def read_checkpoint(path: Path) -> Any:
    """A file of `torch.save` before torch 1.6: five pickles, then the numbers.

    The pickles: a magic number, the format's version, the machine's type sizes, the
    object, and the keys of its storages in the order in which their numbers follow.
    """
    with path.open("rb") as file:
        for _ in range(3):
            RestrictedUnpickler(file).load()
        reader = RestrictedUnpickler(file, most=path.stat().st_size)
        content = reader.load()
        for key in RestrictedUnpickler(file).load():
            storage = reader.storages[key]
            (count,) = np.frombuffer(file.read(8), "<i8")
            assert count == storage.size
            storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
        assert not file.read(1)
    return content


# --- The Hugging Face folder ----------------------------------------------------------

_LAYER_NAMES = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_NAMES = {
    "sentence_encoder.embed_tokens": "roberta.embeddings.word_embeddings",
    "sentence_encoder.embed_positions": "roberta.embeddings.position_embeddings",
    "sentence_encoder.emb_layer_norm": "roberta.embeddings.LayerNorm",
    "lm_head": "lm_head",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
} | {
    f"sentence_encoder.layers.{n}.{fairseq}": f"roberta.encoder.layer.{n}.{hf}"
    for n in range(4)
    for fairseq, hf in _LAYER_NAMES.items()
}


def to_hf(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """fairseq's tensors -> RobertaForMaskedLM's, every one used."""
    weights = {name.removeprefix("decoder."): x for name, x in weights.items()}
    output = weights.pop("lm_head.weight")
    assert (output == weights["sentence_encoder.embed_tokens.weight"]).all()  # tied
    tensors = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        tensors[f"{_NAMES[module]}.{kind}"] = value
    # fairseq's RoBERTa has no token types; a row of zeros says so.
    types = "roberta.embeddings.token_type_embeddings.weight"
    tensors[types] = np.zeros_like(tensors["roberta.embeddings.LayerNorm.bias"][None])
    return tensors


def write_folder(checkpoint: Path, folder: Path) -> None:
    """config.json and model.safetensors, as Hugging Face's RobertaForMaskedLM."""
    content = read_checkpoint(checkpoint)
    tensors, options = to_hf(content["model"]), content["args"]
    rows, width = tensors["roberta.embeddings.position_embeddings.weight"].shape
    config = {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": len(SYMBOLS),
        "max_position_embeddings": rows,
        "num_hidden_layers": options.encoder_layers,
        "hidden_size": width,
        "num_attention_heads": options.encoder_attention_heads,
        "intermediate_size": options.encoder_ffn_embed_dim,
        "type_vocab_size": 1,
        "pad_token_id": SYMBOLS.index("<pad>"),
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
