# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE: training one, loading one, and telling two apart.

The recipe is that of GPT-2 (Radford et al. 2019, section 2.2) and RoBERTa
(arXiv:1907.11692, section 4.4): a text is a string of bytes, so nothing is unknown and
every text comes back whole.
"""

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lm_scale.errors import InputError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Kind = Literal["gpt2", "roberta"]

# Token -> the roles it plays; ids follow this order, from 0.
_ROLES = {
    "gpt2": {"<|endoftext|>": ("bos_token", "eos_token", "unk_token")},
    "roberta": {
        "<s>": ("bos_token", "cls_token"),
        "<pad>": ("pad_token",),
        "</s>": ("eos_token", "sep_token"),
        "<unk>": ("unk_token",),
        "<mask>": ("mask_token",),
    },
}
# One of these makes a folder a tokenizer's. (Of a config.json alone transformers would
# make an empty one.)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
# All that transformers may read a tokenizer from.
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
)
_BYTES = 256  # the initial alphabet of a byte-level vocabulary


@dataclass(frozen=True)
class TokenizerConfig:
    """An existing tokenizer, or how to train one."""

    path: str | None = None  # folder, tokenizer.json or hub name; None: train one
    vocab_size: int = 50_257  # tokens, special ones and the 256 bytes included
    min_frequency: int = 2  # a pair seen less often is not merged
    # Special tokens: <|endoftext|>, or <s> <pad> </s> <unk> <mask> with <s> ... </s>
    # around each text.
    kind: Kind = "gpt2"

    def __post_init__(self):
        if self.kind not in _ROLES:
            raise InputError(
                f"tokenizer kind is {self.kind!r}; expected one of "
                f"{', '.join(get_args(Kind))}."
            )
        least = _BYTES + len(_ROLES[self.kind])
        if self.vocab_size < least:
            raise InputError(
                f"vocab_size is {self.vocab_size}; a {self.kind} tokenizer needs at "
                f"least {least}: 256 bytes and {least - _BYTES} special tokens."
            )


def train_tokenizer(
    texts: Iterable[str], config: TokenizerConfig, *, max_length: int | None = None
) -> "PreTrainedTokenizerFast":
    """Trains the byte-level BPE of `config` on the texts; `config.path` is not read.

    max_length is the model's longest sequence in tokens (`model_max_length`). Keep the
    result with `save_pretrained(folder)`: `AutoTokenizer` loads that folder. Warns when
    the corpus has too few pairs to fill the vocabulary: `len(tokenizer)` is then less.

    Raises:
      InputError: there is no text.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import ByteLevel as ByteLevelOffsets
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise InputError("no text to train a tokenizer on; give a corpus.")

    # As in RoBERTa, <mask> takes the space before it: "a <mask>" is "a word" masked.
    special = [
        AddedToken(token, lstrip=token == "<mask>", special=True)
        for token in _ROLES[config.kind]
    ]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,  # data/recipe.py shows more
    )
    backend.train_from_iterator(itertools.chain([first], texts), trainer)
    if config.kind == "roberta":
        backend.post_processor = TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[(t, backend.token_to_id(t)) for t in ("<s>", "</s>")],
        )
    else:
        backend.post_processor = ByteLevelOffsets(trim_offsets=False)

    size = backend.get_vocab_size()
    if size < config.vocab_size:
        warnings.warn(
            f"the corpus fills {size} of the {config.vocab_size} tokens of the "
            f"vocabulary (min_frequency {config.min_frequency}); the tokenizer has "
            f"{size}.",
            stacklevel=2,
        )
    return _with_roles(backend, max_length)


def load_tokenizer(
    path: str | Path, *, cache_dir: str | None = None
) -> "PreTrainedTokenizerFast":
    """Loads a tokenizer from a folder, a plain tokenizer.json or the hub.

    A tokenizer.json does not say which token ends a text or fills a batch: without a
    tokenizer_config.json beside it the roles go to <|endoftext|>, <s>, <pad>, </s>,
    <unk> and <mask> by name. Code that comes with a tokenizer is never run.
    cache_dir: of downloads; None: Hugging Face's default.

    Raises:
      InputError: there is no tokenizer, it is broken, it names code of its own, or it
        has no fast form.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    local = Path(path).expanduser()
    named_as_file = str(path).startswith((".", "/", "~")) or local.suffix == ".json"
    if named_as_file and not local.exists():
        raise InputError(f"no tokenizer at {path}: there is no such file or folder.")
    # Alone, a tokenizer.json is the whole truth: AutoTokenizer would rebuild it after
    # the model class that a config.json beside it names.
    plain = local if local.is_file() else local / "tokenizer.json"
    if local.is_dir() and not any((local / name).exists() for name in _VOCABULARIES):
        raise InputError(
            f"no tokenizer in {path}: the folder has none of "
            f"{', '.join(_VOCABULARIES)}."
        )
    alone = local.is_file() or not (local / "tokenizer_config.json").exists()
    try:
        if plain.is_file() and alone:
            return _with_roles(Tokenizer.from_file(str(plain)))
        name = str(local) if local.exists() else str(path)
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, cache_dir=cache_dir
        )
    except Exception as error:  # the libraries raise bare Exception for a broken file
        raise InputError(
            f"cannot load a tokenizer from {path}: expected a folder that "
            "save_pretrained wrote, a tokenizer.json or a name on the hub "
            f"({one_line(error, 200)})."
        ) from error
    if tokenizer.init_kwargs.get("auto_map"):  # else another class takes its place
        raise InputError(
            f"the tokenizer {path} names Python code that comes with it (auto_map), "
            "which is never run. If its tokenizer.json says it all, delete `auto_map` "
            "from a copy of tokenizer_config.json."
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer {path} has no tokenizer.json and cannot be converted to "
            "one; choose a tokenizer that has."
        )
    return tokenizer


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """sha256 of what turns text into ids: the tokenizer.json in canonical form.

    Survives saving and loading; truncation and padding, which calls change, are left
    out.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the highest id: the rows that an embedding needs at least."""
    return max(tokenizer.get_vocab().values()) + 1


def describe_roles(tokenizer: "PreTrainedTokenizerFast") -> str:
    """One line that says which token plays which role, for a person to check."""
    roles: dict[str, list[str]] = {}
    for role, token in sorted(tokenizer.special_tokens_map.items()):
        if isinstance(token, str):  # further special tokens are a list, without a role
            roles.setdefault(token, []).append(role.removesuffix("_token"))
    ids = {token: tokenizer.get_vocab()[token] for token in roles}
    played = [
        f"{'/'.join(roles[token])} {token} {ids[token]}"
        for token in sorted(roles, key=lambda token: ids[token])
    ]
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    tokens = tokenizer.convert_ids_to_tokens(whole)
    around = ["..." if i in bare else t for i, t in zip(whole, tokens, strict=True)]
    return (
        f"tokenizer: {len(tokenizer):,} tokens; "
        f"{', '.join(played) or 'no token has a role'}; adds "
        f"{'no special tokens' if whole == bare else ' '.join(around)} around a text"
    )


def _with_roles(backend: "Tokenizer", max_length: int | None = None):
    """The `transformers` tokenizer of a `tokenizers` one, roles given by name."""
    from transformers import PreTrainedTokenizerFast

    options = {} if max_length is None else {"model_max_length": max_length}
    for kind in ("gpt2", "roberta"):  # <s> and </s> win over <|endoftext|>
        for token, roles in _ROLES[kind].items():
            if backend.token_to_id(token) is not None:
                options.update(dict.fromkeys(roles, token))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # or decoding drops spaces of the text
        **options,
    )
