# SPDX-License-Identifier: Apache-2.0
"""The text of a run: its tokenizer, its token stores, and the batches made of them."""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from lm_scale import distributed
from lm_scale.config import RunConfig
from lm_scale.console import say
from lm_scale.data.corpus import Part, documents
from lm_scale.data.encoding import Encoder, Spec
from lm_scale.data.examples import Blocks, Documents, Pieces, Source
from lm_scale.data.loader import EvalBatches, TrainBatches
from lm_scale.data.mixed import Mixed
from lm_scale.data.mixture import Mixture
from lm_scale.data.packing import open_plan
from lm_scale.data.prepare import Most, end_of_text, prepare
from lm_scale.data.ranks import Rank
from lm_scale.data.recipe import train_shown
from lm_scale.data.shards import Shards
from lm_scale.data.sources import local_files
from lm_scale.data.store import TokenStore
from lm_scale.data.streamed import StreamedBatches
from lm_scale.data.tokenizer import (
    load_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)
from lm_scale.data.waiting import wait_for
from lm_scale.errors import InputError, differences, flatten
from lm_scale.generate import check_prompt
from lm_scale.objectives import Vocabulary
from lm_scale.run_json import to_dict
from lm_scale.sharding import (
    shards,
)

# Of a stream: characters that a tokenizer is trained on, and, unless the config says
# otherwise, how much of the held-out text is kept to evaluate on.
SAMPLE, EVAL_EXAMPLES = 200_000_000, 1000
PAD_MULTIPLE = 16  # tokens; widths of padded batches, that few programs are compiled


def prepare_tokenizer(config: RunConfig, console: Console, *, makes: bool = True):
    """The tokenizer of the run: the one in the store, the one named, or a new one.

    makes: False waits for rank 0 to put it into the store.
    Raises InputError if the store's tokens were made with another one, StorageError if
    rank 0 does not come.
    """
    if not makes:
        folder = f"{config.store_dir}/tokenizer"
        wait_for(folder, ["recipe.json"], "the tokenizer", console)
    store, settings = Path(config.store_dir), config.data.tokenizer
    folder, note = store / "tokenizer", store / "tokenizer" / "recipe.json"
    try:
        there = json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        there = None  # never finished: made again
    tokenizer = None
    if settings.path is None:
        recipe = recipe_of(config)
    else:
        try:
            tokenizer = load_tokenizer(settings.path, cache_dir=config.data.cache_dir)
        except InputError:
            if there is None or "hash" not in there:
                raise
            return load_tokenizer(folder)  # it is gone, but was kept here
        recipe = {"hash": tokenizer_hash(tokenizer)}
    if there == recipe:
        return load_tokenizer(folder)
    folders = (store, *store.glob("*/"))  # or those of a mixture's sources
    parts = ("train", "validation")
    made = any((folder / part).exists() for folder in folders for part in parts)
    if there is not None and made:
        found = differences(flatten(there), flatten(recipe))
        if "hash" in there and "hash" in recipe:
            found = [f"the tokenizer {settings.path} is another one or has changed"]
        raise InputError(
            f"The tokens in {store} were made otherwise: {'; '.join(found)}. "
            f"Choose another `data.store`, or delete {store}."
        )
    if not makes:
        raise InputError(
            f"The tokenizer in {folder} was made otherwise, and rank 0 has not yet "
            "made it anew. Start this rank again once it has."
        )
    if tokenizer is None:
        texts: Iterable[str] = training_texts(config)
        if config.data.stream:
            texts = first_texts(texts, SAMPLE)
        say(console, f"Training a tokenizer of {settings.vocab_size} tokens ...")
        length = config.model.positions
        tokenizer = train_shown(texts, settings, max_length=length, console=console)
    tokenizer.save_pretrained(folder)
    note.write_text(json.dumps(recipe))  # last: the folder is whole
    return tokenizer


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """What a tokenizer is trained on, and how, as JSON values."""
    corpora = {name: to_dict(corpus) for name, corpus in config.corpora.items()}
    for corpus in corpora.values():
        del corpus["streaming"]  # another way to the same text
    text = {"mixture": corpora} if config.data.mixture else {"corpus": corpora[""]}
    return json.loads(json.dumps({**text, "tokenizer": to_dict(config.data.tokenizer)}))


def training_texts(config: RunConfig) -> Iterator[str]:
    """The documents to train a tokenizer on: all, one of each corpus in turn.

    Whatever the weights of a mixture: those may be changed with the tokenizer kept.
    """
    options: Any = {"cache_dir": config.data.cache_dir, "workers": config.data.workers}
    corpora = []
    for name, corpus in config.corpora.items():
        with named(name):
            corpora.append(documents(corpus, "train", **options))
    turns = itertools.zip_longest(*corpora)
    return (text for turn in turns for text in turn if text is not None)


@contextlib.contextmanager
def named(source: str) -> Iterator[None]:
    """Says of which source of a mixture an InputError is; "": there is but one."""
    try:
        yield
    except InputError as error:
        if not source:
            raise
        raise InputError(f"data.mixture, {source}: {error}") from error


def first_texts(texts: Iterable[str], most: int) -> Iterator[str]:
    """The first of them, up to the one that reaches `most` characters in all."""
    for text in texts:
        yield text
        most -= len(text)
        if most <= 0:
            return


def prepare_data(
    config: RunConfig,
    console: Console,
    parts: Sequence[Part] = ("train", "validation"),
):
    """Makes what is missing of tokenizer and token stores; returns the tokenizer.

    With `data.stream` the text to train on is never stored.
    Process 0 makes it; the others wait for it, and then must find it too.
    Raises InputError if the tokenizer does not fit the model or the objective.
    """
    parts = stored(config, parts)
    if distributed.index() == 0:
        tokenizer = make_data(config, console, parts)
        distributed.from_first("made")
        return tokenizer
    distributed.from_first(None)
    store = Path(config.store_dir)
    for name in config.corpora:
        for part in parts:
            distributed.see(store / name / part / "manifest.json")
    return load_tokenizer(distributed.see(store / "tokenizer" / "recipe.json").parent)


def stored(config: RunConfig, parts: Sequence[Part]) -> list[Part]:
    """Those of the parts that a run has a token store of."""
    return [part for part in parts if part != "train" or not config.data.stream]


def prepare_share(config: RunConfig, console: Console, rank: Rank) -> None:
    """A rank's share of `prepare_data`; whoever makes the last part completes it.

    Processes that jax.distributed has connected go on together when all is complete;
    other ranks end each for itself. Rank 0 makes the tokenizer, the others wait for it.
    """
    together = distributed.count() > 1
    if together and distributed.index() > 0:
        console = Console(quiet=True)
    parts = stored(config, ("train", "validation"))
    if config.data.stream:
        say(console, "data.stream: what is trained on is read while training; only the "
            "tokenizer and the held-out text are stored.")  # fmt: skip
    make_data(config, console, parts, rank)
    if together:
        distributed.everyone(True)
        if distributed.index() == 0:
            # It may not have seen the parts of others that are on a network's disk.
            make_data(config, Console(quiet=True), parts, Rank())
        distributed.from_first("made")


def make_data(
    config: RunConfig, console: Console, parts: Sequence[Part], rank: Rank | None = None
):
    """`prepare_data`, by the process that does it, or a rank's share of it."""
    makes = rank is None or rank.index == 0
    tokenizer = prepare_tokenizer(config, console, makes=makes)
    size = vocabulary_size(tokenizer)
    if size > config.model.vocab:
        raise InputError(
            f"The tokenizer has {size} tokens, the model's embedding "
            f"{config.model.vocab} rows. Set `model.vocab` to {size} or more."
        )
    pad_id = getattr(config.model, "pad_id", None)  # the causal families have none
    if pad_id is not None and tokenizer.pad_token_id is None:
        raise InputError(
            f"The tokenizer has no padding token, which the model wants as token "
            f"{pad_id} (model.pad_id). Use one that has, such as `<pad>`."
        )
    if pad_id is not None and pad_id != tokenizer.pad_token_id:
        raise InputError(
            f"model.pad_id = {pad_id}, but the tokenizer's padding token is "
            f"{tokenizer.pad_token_id}. Set `model.pad_id` to that."
        )
    if config.sample_prompt is not None:
        check_prompt(config.model, tokenizer, config.sample_prompt)
    config.objective.check(vocabulary_of(tokenizer))
    limits: dict[Part, Most] = {part: most(config, part) for part in parts}
    for name, corpus in config.corpora.items():
        if name:
            say(console, f"{name}:")
        with named(name):
            prepare(
                corpus, tokenizer, Path(config.store_dir) / name, parts=limits,
                separator=config.data.separator, cache_dir=config.data.cache_dir,
                workers=config.data.workers, rank=rank, console=console,
            )  # fmt: skip
    return tokenizer


def most(config: RunConfig, part: Part) -> Most:
    """How much of the text makes the examples that the config asks for."""
    examples = max_examples(config, part)
    if examples is None:
        return Most()
    if config.data.examples == "documents":
        return Most(documents=examples)
    return Most(tokens=examples * config.seq_len)


def vocabulary_of(tokenizer) -> Vocabulary:
    """What the objectives have to know of a tokenizer."""
    special = tuple(sorted(tokenizer.all_special_ids))
    return Vocabulary(
        vocabulary_size(tokenizer), special, tokenizer.mask_token_id,
        tokenizer.pad_token_id,
    )  # fmt: skip


def open_train(config: RunConfig, tokenizer, mesh: Mesh) -> TrainBatches:
    """The training batches of a run whose store exists."""
    return TrainBatches(
        open_source(config, tokenizer, mesh, "train"),
        config.objective, vocabulary_of(tokenizer),
        batch=config.batch, seed=config.seed,
    )  # fmt: skip


def open_stream(config: RunConfig, tokenizer, mesh: Mesh) -> StreamedBatches:
    """The training batches of a run that reads its corpus as it goes."""
    data = config.data
    shards = Shards(data.corpus, cache_dir=data.cache_dir)
    tokens = {"tokenizer": tokenizer_hash(tokenizer), "shards": shards.count}
    files = local_files(data.corpus.source, data.corpus.subset)
    if files:  # the others cannot be told from what they were without reading them
        facts = [[file.name, file.stat().st_size] for file in files]
        tokens["files"] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    end = end_of_text(tokenizer) if data.separator else None
    spec = Spec(tokenizer.backend_tokenizer.to_str(), end, "int32")
    return StreamedBatches(
        shards, Encoder(spec), config.objective, vocabulary_of(tokenizer),
        batch=config.batch, seq_len=config.seq_len, seed=config.seed,
        lanes=data.stream_lanes, buffer=data.stream_buffer, tokens=tokens,
    )  # fmt: skip


def open_eval(config: RunConfig, tokenizer, mesh: Mesh) -> EvalBatches:
    """The held-out batches of a run whose store exists.

    A batch is a part of a training batch unless the config says otherwise, made larger
    where the mesh cannot cut that evenly: its size changes no result.
    """
    parts = shards(config.compute.rules, mesh, "batch")
    wanted = config.eval_batch or -(-config.batch // config.accumulate)
    return EvalBatches(
        open_source(config, tokenizer, mesh, "validation"),
        config.objective, vocabulary_of(tokenizer),
        batch=-(-wanted // parts) * parts, seed=config.seed,
    )  # fmt: skip


def max_examples(config: RunConfig, part: Part) -> int | None:
    data = config.data
    if part == "train":
        return data.max_train_examples
    by_default = EVAL_EXAMPLES if data.stream else None
    return data.max_eval_examples or by_default


def open_source(config: RunConfig, tokenizer, mesh: Mesh, part: Part) -> Source | Mixed:
    """The examples of one part of the text, of all its sources."""
    sources = {
        name: open_examples(config, tokenizer, mesh, part, name)
        for name in config.corpora
    }
    if not config.data.mixture:
        return sources[""]
    weights = [share.weight for share in config.data.mixture]
    return Mixed(sources, Mixture(weights, seed=config.seed))


def open_examples(
    config: RunConfig, tokenizer, mesh: Mesh, part: Part, name: str
) -> Source:
    """The examples of one part of the text, of the source in this folder."""
    folder = Path(config.store_dir) / name
    store, data = TokenStore.open(folder / part), config.data
    if data.examples == "blocks":
        return Blocks(store, config.seq_len, most=max_examples(config, part))
    if data.examples != "documents":
        plans = folder / "plans" / part
        plan = open_plan(store, data.examples, config.seq_len, plans)
        return Pieces(store, config.seq_len, plan, most=max_examples(config, part))
    return Documents(
        store, config.seq_len, most=max_examples(config, part),
        special_ids=vocabulary_of(tokenizer).special_ids,
        pad_to_seq_len=data.pad_to_seq_len,
        # Twice the parts of a sequence: ring attention has two chunks in each.
        multiple=math.lcm(
            PAD_MULTIPLE, 2 * shards(config.compute.rules, mesh, "seq"),
            shards(config.compute.rules, mesh, "residual_seq"),
        ),
    )  # fmt: skip
