# SPDX-License-Identifier: Apache-2.0
"""The options of the commands that take no config file, for tyro to parse."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import Kind

RunDir = Annotated[Positional[str], arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Tokenizer:
    """Trains a byte-level BPE tokenizer on a corpus and saves it for AutoTokenizer."""

    out: str  # folder to write; a config.json in it stays
    kind: Kind = "roberta"  # special tokens: <s> <pad> </s> <unk> <mask>, or GPT-2's
    vocab_size: int = 50_265  # tokens, special ones and the 256 bytes included
    min_frequency: int = 2  # a pair seen less often is not merged
    max_length: int = 512  # tokens of the model's longest sequence
    overwrite: bool = False  # replace the tokenizer that is in the folder
    # What to train on; nothing is held out unless asked for.
    corpus: CorpusConfig = CorpusConfig(validation_fraction=0.0)


@dataclass(frozen=True)
class Config:
    """Writes the Hugging Face config.json of a named shape, a folder or a hub model."""

    # roberta-base, gpt2, gpt2-medium, gpt2-large, gpt2-xl, bert-base, a folder, a hub
    # name.
    name: Annotated[Positional[str], arg(metavar="NAME")]
    out: str  # folder to write config.json to
    # Of the config.json, such as resid_pdrop=0.0
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE ...")] = ()
    overwrite: bool = False  # replace a config.json of another content


@dataclass(frozen=True)
class Checkpoint:
    """Shows what is in a run's checkpoints, and checks it.

    list: each checkpoint, its size and its state. verify: reads all data, and compares
    them with the hashes that were taken in memory. show: what one holds, and the run's
    config. Exit status 1 if one cannot be used.
    """

    what: Annotated[
        Positional[Literal["list", "verify", "show"]], arg(metavar="list|verify|show")
    ]
    # The folder of a run, of its checkpoints, or of one of them; gs://... too.
    where: Annotated[Positional[str], arg(metavar="DIR")]
    step: int | None = None  # of this checkpoint only


@dataclass(frozen=True)
class Eval:
    """Evaluates the newest checkpoint of a run on its held-out split."""

    run_dir: RunDir  # folder of a run that has a checkpoint


@dataclass(frozen=True)
class Generate:
    """Continues a text (causal LM), or fills in its masks (masked LM)."""

    run_dir: RunDir  # folder of a run that has a checkpoint
    prompt: str = "The"  # may hold <mask> for a masked LM
    max_new_tokens: int = 100  # tokens to add; fewer where the model's positions end
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from so many likeliest tokens only; 0: from all
    top_p: float = 0.95  # draw from the fewest tokens that hold this probability
    samples: int = 1  # texts
    seed: int = 0


@dataclass(frozen=True)
class Export:
    """Writes the newest checkpoint of a run as a Hugging Face model."""

    run_dir: RunDir  # folder of a run that has a checkpoint
    out: str | None = None  # folder; default: RUN_DIR
