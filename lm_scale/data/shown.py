# SPDX-License-Identifier: Apache-2.0
"""Tokens as text that a terminal can show, whatever a corpus holds."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lm_scale.data.store import TokenStore
from lm_scale.data.tokenizer import load_tokenizer, tokenizer_hash
from lm_scale.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def text_of(tokenizer: "PreTrainedTokenizerFast | None", tokens: np.ndarray) -> str:
    """The text of tokens [T], special ones included; without a tokenizer, numbers."""
    if tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    text = tokenizer.decode(
        tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return visible(str(text))


def visible(text: str) -> str:
    """On one line, and nothing in it can steer a terminal: such is escaped."""
    return "".join(
        c if c.isprintable() else "⏎" if c == "\n" else ascii(c)[1:-1] for c in text
    )


def tokenizer_of(store: TokenStore) -> "PreTrainedTokenizerFast | None":
    """The tokenizer that made a local store, if it stands in a folder above it.

    Raises InputError if the one beside the store is another one.
    """
    path = str(store.path)
    for folder in [] if "://" in path else list(Path(path).resolve().parents)[:2]:
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(folder / "tokenizer")
            check_made_by(store, tokenizer, folder / "tokenizer")
            return tokenizer
    return None


def check_made_by(store: TokenStore, tokenizer, folder: Path) -> None:
    """InputError if another tokenizer has made the store's tokens."""
    found, made = tokenizer_hash(tokenizer), store.manifest.tokenizer_hash
    if found != made:
        raise InputError(
            f"the tokens of {store.path} were made by a tokenizer with the hash "
            f"{made:.12}, and that in {folder} has {found:.12}. Put the right one "
            "there, or delete the store and run `prepare` again."
        )
