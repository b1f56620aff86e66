# SPDX-License-Identifier: Apache-2.0
"""From a corpus to token stores, one a part: `out/train` and `out/validation`."""

import itertools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from lm_scale.console import say
from lm_scale.data.corpus import CorpusConfig, Part, documents
from lm_scale.data.store import Manifest, StoreWriter, read_manifest
from lm_scale.data.tokenizer import tokenizer_hash, vocabulary_size
from lm_scale.errors import InputError, differences, flatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A batch for the tokenizer's threads ends at whichever comes first.
_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 1 << 22  # whole books must not add up to gigabytes


@dataclass(frozen=True)
class Most:
    """Where to stop reading a part; None: at its end."""

    documents: int | None = None
    tokens: int | None = None  # the batch of documents that reaches it is the last


def prepare(
    corpus: CorpusConfig,
    tokenizer: "PreTrainedTokenizerFast",
    out: str | Path,
    *,
    parts: Mapping[Part, Most] | None = None,
    separator: bool = True,
    cache_dir: str | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> dict[Part, Manifest]:
    """Tokenizes the parts of a corpus into the token stores `out/<part>`.

    A document is encoded as the tokenizer does it, its special tokens around it, but
    text that merely looks like a special token ("<s>" in HTML) stays text. With
    `separator` the end-of-text token follows each document that does not end with it.
    A part that is there already, made from the same corpus by the same tokenizer, is
    kept; the text itself is not compared. `out` is a folder or a url (gs://, s3://).

    parts: those to make, and how much of them (default: all of both).
    cache_dir, workers: of `documents`; the workers are also the tokenizer's threads
    (default: one a CPU), but only the first call of a process can set those.
    console takes the progress, shown if it is a terminal, and a closing line for each
    part (default: standard output).

    Raises:
      InputError: nothing to read (see `documents`), an empty part, a tokenizer without
        an end-of-text token, or a different store at `out/<part>`. All but a broken
        row are found before the first token is written.
    """
    console = console or Console()
    parts = {"train": Most(), "validation": Most()} if parts is None else parts
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    end = end_of_text(tokenizer) if separator else None
    origin = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
        "separator": end,
    }
    manifests: dict[Part, Manifest] = {}
    streams: dict[Part, Iterator[str]] = {}
    for part, most in parts.items():
        path, source = _path(out, part), _source(corpus, part, most)
        manifest = read_manifest(path)
        if manifest is None:
            _check_free(path)
            texts = documents(corpus, part, cache_dir=cache_dir, workers=workers)
            texts = itertools.islice(texts, most.documents)
            streams[part] = _nonempty(texts, part)
        else:
            _check_same(path, manifest, origin | {"source": source})
            manifests[part] = manifest
            say(console, f"{part}: kept {path}: {_summary(manifest)}")

    encode = encoder(tokenizer, end)
    for part, texts in streams.items():
        path, source = _path(out, part), _source(corpus, part, parts[part])
        start = time.perf_counter()
        manifests[part] = _build(
            path, texts, encode, origin | {"source": source}, parts[part], console
        )
        seconds = time.perf_counter() - start
        say(console, f"{part}: {_summary(manifests[part])}, {seconds:.1f} s")
    return manifests


def _source(corpus: CorpusConfig, part: Part, most: Most) -> dict[str, Any]:
    """What a store was made of, as its manifest keeps it."""
    limits = {f"most_{name}": x for name, x in asdict(most).items() if x is not None}
    fields = asdict(corpus)
    del fields["streaming"]  # another way to the same text
    return fields | {"part": part} | limits


def _path(out: str | Path, part: Part) -> str:
    return os.path.join(os.path.expanduser(out), part)


def end_of_text(tokenizer: "PreTrainedTokenizerFast") -> int:
    for name in (tokenizer.eos_token, tokenizer.sep_token):
        if name is not None:
            return tokenizer.get_vocab()[str(name)]
    raise InputError(
        "the tokenizer has no end-of-text token (eos or sep) to separate documents; "
        "choose one that has, or prepare without a separator."
    )


def _nonempty(texts: Iterator[str], part: Part) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        advice = {
            "train": "lower validation_fraction",
            "validation": "raise validation_fraction, give a validation_source, or do "
            "without evaluation",
        }
        raise InputError(f"no document falls to {part}; {advice[part]}.")
    return itertools.chain([first], texts)


def _check_free(path: str) -> None:
    """A local folder is renamed into place, so nothing else may be there."""
    taken = os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path))
    if "://" not in path and taken:
        raise InputError(
            f"{path} holds files but no complete token store; delete it or choose "
            "another folder."
        )


def _check_same(path: str, manifest: Manifest, wanted: dict[str, Any]) -> None:
    there = {name: getattr(manifest, name) for name in wanted}
    found = differences(flatten(there), flatten(wanted))
    if found:
        raise InputError(
            f"{path} holds a token store that differs in {'; '.join(found)}. "
            "Choose another folder or delete it."
        )


def encoder(
    tokenizer: "PreTrainedTokenizerFast", end: int | None
) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids, each ending with `end`."""
    from tokenizers import Tokenizer

    # A copy: these settings are no business of the caller's tokenizer.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<s>" in a text is three characters

    def encode(texts: list[str]) -> list[list[int]]:
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
        if end is not None:
            ids = [row if row and row[-1] == end else [*row, end] for row in ids]
        return ids

    return encode


def _build(
    path: str,
    texts: Iterator[str],
    encode: Callable[[list[str]], list[list[int]]],
    fields: dict[str, Any],
    most: Most,
    console: Console,
) -> Manifest:
    """Writes one store: locally beside its place, then renamed into it."""
    local = "://" not in path
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}") if local else path
    source = fields["source"]
    try:
        with StoreWriter(scratch, vocab_size=fields["vocab_size"]) as writer:
            for ids in _tracked(map(encode, _batches(texts)), source["part"], console):
                writer.append(ids)
                if most.tokens is not None and writer.tokens >= most.tokens:
                    break
            manifest = writer.finish(
                tokenizer_hash=fields["tokenizer_hash"],
                separator=fields["separator"],
                source=source,
            )
        if local:
            os.rename(scratch, path)
    except BaseException:
        if local:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    return manifest


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tracked(
    batches: Iterator[list[list[int]]], part: Part, console: Console
) -> Iterator[list[list[int]]]:
    """The same batches, counted on the console where it is a terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}")
    start = time.perf_counter()
    documents, tokens = 0, 0
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(part, total=None)
        for batch in batches:
            documents += len(batch)
            tokens += sum(map(len, batch))
            rate = tokens / (time.perf_counter() - start)
            progress.update(
                task,
                description=f"{part}: {documents:,} documents, {tokens:,} tokens, "
                f"{rate:,.0f} tokens/s",
            )
            yield batch


def _summary(manifest: Manifest) -> str:
    mean = manifest.tokens / max(1, manifest.documents)
    return (
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"mean length {mean:.1f}"
    )
