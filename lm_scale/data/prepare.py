# SPDX-License-Identifier: Apache-2.0
"""From a corpus to token stores, one a part: `out/train` and `out/validation`.

What is checked before the first token, in which order the parts are made, and what is
said; data/work.py makes a store.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lm_scale.console import say
from lm_scale.cpus import cpus
from lm_scale.data.corpus import CorpusConfig, Part, open_text
from lm_scale.data.encoding import Encoders, Spec
from lm_scale.data.places import remove
from lm_scale.data.ranks import Rank
from lm_scale.data.store import Manifest, read_manifest, token_type
from lm_scale.data.tokenizer import tokenizer_hash, vocabulary_size
from lm_scale.data.work import Job, Label, Most, finished, make
from lm_scale.errors import InputError, differences, flatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Most", "prepare"]


def prepare(
    corpus: CorpusConfig,
    tokenizer: "PreTrainedTokenizerFast",
    out: str | Path,
    *,
    parts: Mapping[Part, Most] | None = None,
    separator: bool = True,
    cache_dir: str | None = None,
    workers: int | None = None,
    rank: Rank | None = None,
    console: Console | None = None,
) -> dict[Part, Manifest]:
    """Tokenizes the parts of a corpus into the token stores `out/<part>`.

    A document is encoded as the tokenizer does it, its special tokens around it, but
    text that merely looks like a special token ("<s>" in HTML) stays text. With
    `separator` the end-of-text token follows each document that does not end with it.
    A part that is there already, made from the same corpus by the same tokenizer, is
    kept; the text itself is not compared. `out` is a folder or a url (gs://, s3://).

    It may be killed at any moment, and goes on from the finished parts when it is
    called again. The bytes of a store depend neither on that nor on workers and ranks.

    parts: those to make, and how much of them (default: all of both).
    cache_dir: of `documents`.
    workers: processes that tokenize, and that read files into Arrow (default: one for
    each CPU that this process may use). With 1 all is done in this one.
    rank: which share of the corpus's units to do; the others do theirs at any time,
    and who is last completes the store. Limits by `Most` or `max_documents` leave a
    single unit, for rank 0. Default: all.
    console takes the progress, shown if it is a terminal, and a closing line for each
    part (default: standard output).

    Returns the manifests of the parts that are complete.

    Raises:
      InputError: nothing to read (see `documents`), an empty part, a tokenizer without
        an end-of-text token, or a different store at `out/<part>`. All but a broken
        row are found before the first token is written.
      StorageError: a full disk, storage that fails, ranks that do not come.
      WorkerDied: a worker was killed.
    """
    console, rank = console or Console(), rank or Rank()
    parts = {"train": Most(), "validation": Most()} if parts is None else parts
    end = end_of_text(tokenizer) if separator else None
    size = vocabulary_size(tokenizer)
    facts = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": size,
        "separator": end,
    }
    spec = Spec(tokenizer.backend_tokenizer.to_str(), end, token_type(size).name)
    manifests: dict[Part, Manifest] = {}
    jobs: dict[Part, Job] = {}
    for part, most in parts.items():
        path = _path(out, part)
        made_of = facts | {"source": _source(corpus, part, most)}
        if (there := _kept(path, made_of, part, console)) is not None:
            manifests[part] = there
            continue
        text = open_text(
            corpus, part, cache_dir=cache_dir, workers=workers, whole=most != Most()
        )
        jobs[part] = Job(path, text, spec, most, made_of)
        if not any(finished(jobs[part])):
            _check_nonempty(jobs[part], part)

    with Encoders[Label](spec, workers or cpus()) as encoders:
        for part, job in jobs.items():
            if (made := _made(job, encoders, rank, part, console)) is not None:
                manifests[part] = made
    return manifests


def _kept(
    path: str, made_of: dict[str, Any], part: Part, console: Console
) -> Manifest | None:
    """The store that is there already; None: there is none, and nothing in its way."""
    there = read_manifest(path)
    if there is None:
        _check_free(path)
        return None
    _check_same(path, there, made_of)
    remove(f"{path}/work")  # if who completed it was killed right then
    say(console, f"{part}: kept {path}: {_summary(there)}")
    return there


def _made(
    job: Job, encoders: Encoders[Label], rank: Rank, part: Part, console: Console
) -> Manifest | None:
    """A rank's share is made; None: others have yet to make theirs."""
    start = time.perf_counter()
    made, missing = make(job, encoders, rank, part, console)
    seconds = time.perf_counter() - start
    if made is None:
        say(
            console,
            f"{part}: rank {rank.index} of {rank.world} is done, {seconds:.1f} s; "
            f"{missing} of {len(job.text.units)} units are still missing: whoever "
            "makes the last one completes the store.",
        )
    else:
        say(console, f"{part}: {_summary(made)}, {seconds:.1f} s")
    return made


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


def _check_free(path: str) -> None:
    """Of a local folder: nothing may be there but an unfinished store."""
    if "://" in path:
        return
    if os.path.isfile(path):
        raise InputError(f"{path} is a file; delete it or choose another folder.")
    if os.path.isdir(path) and set(os.listdir(path)) - {"parts", "work"}:
        raise InputError(
            f"{path} holds files but no complete token store; delete it or choose "
            "another folder."
        )


def _check_nonempty(job: Job, part: Part) -> None:
    """InputError if no document is for this part; reads until there is one."""
    for unit in job.text.units:
        if any(document is not None for _, document in job.text.read(unit)):
            return
    if job.text.units:
        job.text.check_any()
    advice = {
        "train": "lower validation_fraction",
        "validation": "raise validation_fraction, give a validation_source, or do "
        "without evaluation",
    }
    raise InputError(f"no document falls to {part}; {advice[part]}.")


def _check_same(path: str, manifest: Manifest, wanted: dict[str, Any]) -> None:
    there = {name: getattr(manifest, name) for name in wanted}
    found = differences(flatten(there), flatten(wanted))
    if found:
        raise InputError(
            f"{path} holds a token store that differs in {'; '.join(found)}. "
            "Choose another folder or delete it."
        )


def _summary(manifest: Manifest) -> str:
    mean = manifest.tokens / max(1, manifest.documents)
    text = (
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"mean length {mean:.1f}"
    )
    for name, said in (
        ("empty", "rows without text dropped"),
        ("duplicates", "duplicates dropped"),
        ("cut", "long documents encoded in pieces"),
        ("replaced", "documents with bytes replaced by U+FFFD"),
    ):
        if count := manifest.counts.get(name):
            text += f", {count:,} {said}"
    return text
