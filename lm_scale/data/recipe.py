# SPDX-License-Identifier: Apache-2.0
"""From a corpus to a tokenizer in a folder, shown on a console while it is made."""

import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lm_scale.console import say
from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.tokenizer import (
    TOKENIZER_FILES,
    TokenizerConfig,
    describe_roles,
    train_tokenizer,
)
from lm_scale.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# RoBERTa's: 50,265 tokens, <s> <pad> </s> <unk> <mask> first.
ROBERTA = TokenizerConfig(vocab_size=50_265, min_frequency=2, kind="roberta")


def make_tokenizer(
    out: str | Path,
    corpus: CorpusConfig,
    config: TokenizerConfig = ROBERTA,
    *,
    max_length: int = 512,
    overwrite: bool = False,
    cache_dir: str | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> "PreTrainedTokenizerFast":
    """Trains a tokenizer on the training part of a corpus and saves it in a folder.

    `AutoTokenizer.from_pretrained(out)` gives the same tokenizer, whatever config.json
    stands beside it. max_length: the model's longest sequence in tokens. overwrite:
    replaces the files of the tokenizer that is there, and no others. cache_dir,
    workers: of `documents`. console takes the progress, if it is a terminal, and
    closing lines (default: standard output).

    Raises:
      InputError: before the text is read for an `out` that cannot be written or that
        holds a tokenizer, and for a corpus without text; later for a broken row.
    """
    console = console or Console()
    if config.path is not None:
        raise InputError(
            f"tokenizer path is {config.path!r}, but here one is trained; leave it out."
        )
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; expected a number above 0.")
    folder = Path(out).expanduser()
    _check_writable(folder, str(out), overwrite)
    texts = documents(corpus, "train", cache_dir=cache_dir, workers=workers)
    tokenizer = train_shown(texts, config, max_length=max_length, console=console)
    _save(tokenizer, folder)
    say(console, f"{describe_roles(tokenizer)}; in {folder}")
    return tokenizer


def train_shown(
    texts: Iterable[str],
    config: TokenizerConfig,
    *,
    max_length: int | None = None,
    console: Console,
) -> "PreTrainedTokenizerFast":
    """`train_tokenizer`, with its progress, its warning and a closing line shown."""
    start, read = time.perf_counter(), _Read()
    with (
        _display(console) as progress,
        warnings.catch_warnings(
            record=True, action="default", category=UserWarning
        ) as caught,
    ):
        tracked = _tracked(texts, read, progress)
        tokenizer = train_tokenizer(tracked, config, max_length=max_length)
    for warning in caught:
        say(console, f"Note: {warning.message}")
    say(console, f"trained on {read}; {time.perf_counter() - start:.1f} s in all")
    return tokenizer


@dataclass
class _Read:
    """What was read so far; the display asks for it when it draws."""

    documents: int = 0
    bytes: int = 0
    start: float = field(default_factory=time.perf_counter)
    end: float | None = None  # None: still reading

    def __str__(self):
        seconds = (self.end or time.perf_counter()) - self.start
        return (
            f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB, "
            f"{self.documents / seconds:,.0f} documents/s"
        )


def _display(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.fields[read]}", markup=False),
        TimeElapsedColumn(),
    )
    hidden = not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=hidden)


def _tracked(texts: Iterable[str], read: _Read, progress: Progress) -> Iterator[str]:
    """The same texts, counted; behind the last one the merges are computed."""
    task = progress.add_task("reading:", total=None, read=read)
    for text in texts:
        read.documents += 1
        read.bytes += len(text.encode())
        yield text
    read.end = time.perf_counter()
    progress.update(task, description="merging the pairs of")


def _check_writable(folder: Path, out: str, overwrite: bool) -> None:
    if not out or folder.is_file():
        raise InputError(f"{out!r} is no folder to write a tokenizer to.")
    there = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if there and not overwrite:
        raise InputError(
            f"{folder} already holds a tokenizer ({', '.join(there)}); choose another "
            "folder or overwrite it."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"cannot write a tokenizer to {folder}: {error.strerror}."
        ) from error


def _save(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Puts the files in place when they are whole; no old one stays beside them."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer.") as scratch:
        tokenizer.save_pretrained(scratch)
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, folder / file.name)
