# SPDX-License-Identifier: Apache-2.0
"""A run is a `RunConfig`: the parts' configs put together, checked before any work.

A config is a Python file with a variable `config`; `--dotted.override value` on the
command line changes single fields.
"""

import dataclasses
import math
import re
import runpy
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from jax.sharding import AbstractMesh, Mesh

from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.share import Share, check_shares
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.errors import InputError
from lm_scale.guard import Guard
from lm_scale.models import Compute, GPT2Config, ModelConfig, family_of
from lm_scale.models.kernels import Kernel, choose_attention
from lm_scale.objectives import CausalLM, MaskedLM, Objective
from lm_scale.optim import AdamW, Optimizer, Schedule
from lm_scale.sharding import PRESETS, MeshShape, Rules, shards
from lm_scale.warm_start import WarmStart

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, examples, and where the prepared tokens lie."""

    corpus: CorpusConfig = CorpusConfig()
    # Several corpora in the place of `corpus`, mixed by weight. Each begins its own
    # epochs; the held-out text is that of all, as much as each has.
    mixture: tuple[Share, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    # True: train straight from the corpus, of which no token store is made but that of
    # the held-out text. (How files are read, also for a store, is corpus.streaming.)
    stream: bool = False
    stream_buffer: int = 10_000  # documents in memory, shuffled among one another
    # Readers, each of its own shards of the corpus if their number divides evenly, else
    # of its own rows. A process reads those of its rows of a batch.
    stream_lanes: int = 1
    separator: bool = True  # an end-of-text token after each document
    # An example is a row of seq_len tokens. blocks: cut from all documents one after
    # the other. segmented: the same, but tokens see those of their own document only.
    # packed: whole documents that do not see each other, as many as fit, longer ones
    # in pieces (best-fit packing). documents: one, cut to seq_len and padded.
    examples: Literal["blocks", "segmented", "packed", "documents"] = "blocks"
    pad_to_seq_len: bool = False  # documents; False: to the longest of their batch
    max_train_examples: int | None = None  # use so many, from the first on
    max_eval_examples: int | None = None
    store: str | None = None  # folder of tokenizer and tokens; None: <run_dir>/data
    cache_dir: str | None = None  # of what Hugging Face downloads; None: its own choice
    workers: int | None = None  # processes that read and tokenize; None: one a CPU


@dataclass(frozen=True)
class RunConfig:
    """All there is to say of a training run."""

    run_dir: str  # everything that the run writes is in this folder
    model: ModelConfig = GPT2Config()
    objective: Objective = CausalLM()
    data: DataConfig = DataConfig()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    guard: Guard = Guard()
    seq_len: int = 512  # tokens of a sequence
    batch: int = 64  # sequences of a step, all devices and processes together
    eval_batch: int | None = None  # of an evaluation step; None: one part of `batch`
    accumulate: int = 1  # equal parts of a batch, worked through one after the other
    steps: int | None = None  # optimizer steps; None: as many as `epochs` make
    epochs: float | None = None  # passes over the training split
    seed: int = 42  # of the first weights, the order of the data, masking and dropout
    # The first weights: RUN_DIR (its newest checkpoint), RUN_DIR/checkpoints/STEP,
    # or a Hugging Face folder or hub name.
    init_from: str | None = None
    init: WarmStart = WarmStart()  # in what their model may be another
    resume_from: str | None = None  # run to go on from, if run_dir holds none yet
    # Fields that may differ from the run's when it goes on, by dotted name.
    override: tuple[str, ...] = ()
    slice: str | None = None  # what `lm-scale plan` plans for: v3-8, h100-8 ...
    mesh: MeshShape = MeshShape()
    compute: Compute = Compute()
    # CPU devices to simulate if there is no accelerator; JAX_NUM_CPU_DEVICES overrides.
    simulated_devices: int = 0
    log_every: int = 10  # steps between lines in the logs
    log_first: bool = False  # a line for the first step too
    # Who gets the metrics, besides metrics.jsonl.
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    eval_every: int | None = None  # steps between evaluations; None: at the end only
    eval_at_end: bool = True
    save_every: int | None = 1000  # steps between checkpoints; None: at the end only
    keep: int | None = 2  # newest checkpoints that stay on disk; None: all
    keep_every: int | None = None  # those of multiples of so many steps stay for good
    keep_best: bool = False  # the one with the lowest held-out loss stays too
    # Where checkpoints are: a folder or gs://bucket/path. None: <run_dir>/checkpoints
    checkpoint_dir: str | None = None
    # auto: go on with the newest good checkpoint, if the run has any. must: fail if
    # there is none. fresh: start anew where all are damaged or gone.
    resume: Literal["auto", "must", "fresh"] = "auto"
    hub: str | None = None  # hub repository that each checkpoint's model is uploaded to
    stop_at: int | None = None  # stop and save after this step; without it, go on
    # Seconds that a step, or a batch of an evaluation, may take until the run is ended
    # as one that hangs. None: 20 times the slowest of late, at least 60; 0: no limit.
    step_limit: float | None = None
    wait_limit: float = 3600.0  # a compilation, restoring or saving; 0: no limit
    sample_prompt: str | None = None  # continued, or its masks filled in, at the end

    def check(self) -> None:
        """InputError for what cannot work on any devices, before any long work."""
        counts = ("seq_len", "batch", "eval_batch", "accumulate", "log_every", "keep")
        times = (
            "steps", "epochs", "eval_every", "save_every", "keep_every", "stop_at",
        )  # fmt: skip
        of_data = (
            "max_train_examples", "max_eval_examples", "workers", "stream_buffer",
            "stream_lanes",
        )  # fmt: skip
        for part, name in [
            *[(self, name) for name in counts + times],
            *[(self.data, name) for name in of_data],
        ]:
            value = getattr(part, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} = {value}: expected a number above 0.")
        for name in ("step_limit", "wait_limit"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} = {value}: expected seconds, 0 for no limit.")
        for name, limit in (("seed", 2**63), ("simulated_devices", 1025)):
            if not 0 <= getattr(self, name) < limit:
                raise InputError(
                    f"{name} = {getattr(self, name)}: expected 0 to {limit - 1}."
                )
        if not self.run_dir:
            raise InputError("run_dir is empty: expected the name of a folder.")
        if self.steps is None and self.epochs is None:
            raise InputError("Say how long to train: give `steps` or `epochs`.")
        if self.steps is not None and self.epochs is not None:
            raise InputError(
                f"`steps` = {self.steps} and `epochs` = {self.epochs}: give one. "
                f"`--steps None` or `--epochs None` unsets the other."
            )
        if self.guard.policy == "rollback" and self.save_every is None:
            raise InputError(
                "guard.policy = 'rollback' goes back to checkpoints, of which a run "
                "with save_every = None has none. Change one of them."
            )
        if self.init_from is None and self.init != WarmStart():
            raise InputError(
                f"init = {self.init}: this is of given weights, and `init_from` names "
                f"none. Give it, or leave `init` out."
            )
        if self.seq_len > self.model.positions:
            raise InputError(
                f"seq_len = {self.seq_len} is longer than the model's position table "
                f"(model.positions = {self.model.positions}). Change one of them."
            )
        if self.seq_len == 1 and isinstance(self.objective, CausalLM):
            raise InputError("seq_len = 1: a single token has no next one; give more.")
        causal = family_of(self.model).causal
        if causal != isinstance(self.objective, CausalLM):
            wanted = CausalLM if causal else MaskedLM
            raise InputError(
                f"The model {type(self.model).__name__} needs the objective "
                f"{wanted.__name__}, not {type(self.objective).__name__}."
            )
        if self.model.layers % self.compute.unroll:
            raise InputError(
                f"compute.unroll = {self.compute.unroll} must divide the number of "
                f"layers (model.layers = {self.model.layers})."
            )
        self._check_tokenizer()
        if self.data.mixture:
            self._check_mixture()
        if self.data.stream:
            self._check_stream()

    def _check_mixture(self) -> None:
        """What of the config several corpora leave no sense."""
        check_shares(self.data.mixture)
        for name, value, instead in (
            ("epochs", self.epochs,
             "each source begins epochs of its own; give `steps`, and the run says how "
             "many epochs of each they make"),
            ("data.max_train_examples", self.data.max_train_examples,
             "it does not say of which source; give `max_documents` of the corpora"),
            ("data.max_eval_examples", self.data.max_eval_examples,
             "it does not say of which source; give `validation_fraction` or "
             "`validation_source` of the corpora"),
        ):  # fmt: skip
            if value is not None:
                raise InputError(f"{name} = {value} with data.mixture: {instead}.")
        if self.data.corpus != CorpusConfig():
            raise InputError(
                f"data.corpus.source = {self.data.corpus.source!r} would not be read: "
                "there is a data.mixture. Make it one of its sources, or leave one out."
            )

    def _check_stream(self) -> None:
        """What a stream cannot do: it has no length, and no order but its own."""
        data = self.data
        if data.mixture:
            raise InputError(
                "data.stream reads one corpus, and there is a data.mixture. Leave one "
                "out (of a mixture token stores are prepared)."
            )
        if data.examples != "blocks":
            raise InputError(
                f"data.stream cuts blocks, not data.examples = {data.examples!r}. Set "
                f"that to blocks, or prepare a token store."
            )
        if self.steps is None:
            raise InputError(
                f"epochs = {self.epochs}, but nobody knows how long an epoch of a "
                f"stream is. Give `steps`."
            )
        if data.max_train_examples is not None:
            raise InputError(
                f"data.max_train_examples = {data.max_train_examples}: a stream ends "
                f"by `steps`; `data.corpus.max_documents` shortens its epochs."
            )
        if data.corpus.holdout != "hash" or not data.corpus.streaming:
            raise InputError(
                f"data.stream needs data.corpus.holdout = 'hash' and "
                f"data.corpus.streaming = True, got {data.corpus.holdout!r} and "
                f"{data.corpus.streaming}."
            )
        if data.corpus.drop_duplicates:
            raise InputError(
                "data.corpus.drop_duplicates = True, but a stream does not know which "
                "documents it has read before. Set it to False, or prepare a token "
                "store (data.stream = False)."
            )
        if self.batch % data.stream_lanes:
            raise InputError(
                f"batch = {self.batch} cannot be dealt evenly to data.stream_lanes = "
                f"{data.stream_lanes}. Use a multiple of it."
            )

    def _check_tokenizer(self) -> None:
        """What can be known of a tokenizer that is yet to be trained."""
        tokenizer = self.data.tokenizer
        if tokenizer.path is not None:
            return
        if isinstance(self.objective, MaskedLM) and tokenizer.kind != "roberta":
            raise InputError(
                f"Masked LM needs a mask token, which a tokenizer of kind "
                f"{tokenizer.kind!r} has not. Set `data.tokenizer.kind` to roberta."
            )
        if tokenizer.vocab_size > self.model.vocab:
            raise InputError(
                f"data.tokenizer.vocab_size = {tokenizer.vocab_size} is more than the "
                f"model's embedding has rows (model.vocab = {self.model.vocab})."
            )

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        """InputError if this mesh cannot cut the batch or the sequences evenly.

        Or if it has devices that the rules give no work of their own.
        """
        rules = self.compute.rules
        busy = rules.batch + rules.seq + rules.act_heads + rules.act_mlp
        for axis, size in mesh.shape.items():
            if size > 1 and axis not in busy:
                raise InputError(
                    f"mesh: {axis} = {size}, but the rules cut no activations of this "
                    f"model over `{axis}`: its devices would all do the same work. "
                    f"Make it 1, or choose other rules (lm-scale rules lists them)."
                )
        rows = shards(rules, mesh, "batch") * self.accumulate
        if self.batch % rows:
            raise InputError(
                f"batch = {self.batch} cannot be divided evenly: the mesh cuts it into "
                f"{shards(rules, mesh, 'batch')} part(s) ({'×'.join(rules.batch)}) and "
                f"accumulate into {self.accumulate}. Use a multiple of {rows}."
            )
        for axis in ("seq", "residual_seq"):
            parts = shards(rules, mesh, axis)
            if self.seq_len % parts:
                raise InputError(
                    f"seq_len = {self.seq_len} cannot be divided evenly: the mesh cuts "
                    f"it into {parts} part(s) ({'×'.join(getattr(rules, axis))}). "
                    f"Use a multiple of {parts}."
                )

    def choose_attention(self, mesh: Mesh) -> tuple[Kernel, str]:
        """What computes attention on this mesh, and why; InputError if it cannot."""
        examples = self.data.examples
        return choose_attention(
            self.compute, self.model, mesh, length=self.seq_len,
            causal=family_of(self.model).causal, segments=examples != "blocks",
            ragged=examples == "documents" and not self.data.pad_to_seq_len,
        )  # fmt: skip

    def total_steps(self, examples: int | None) -> int:
        """Optimizer steps of the run, whose training split has so many sequences.

        None: it is a stream, and `steps` are given.
        """
        if self.steps is not None:
            return self.steps
        assert examples is not None  # check
        return math.ceil((self.epochs or 0.0) * examples / self.batch)

    @property
    def evaluates(self) -> bool:
        """If held-out text is needed."""
        return self.eval_at_end or self.eval_every is not None

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints, or its address in an object store."""
        return self.checkpoint_dir or str(Path(self.run_dir) / "checkpoints")

    @property
    def store_dir(self) -> str:
        """Folder that holds `tokenizer`, `train` and `validation`.

        Of a mixture: `tokenizer`, and the latter two in a folder for each source.
        """
        return self.data.store or str(Path(self.run_dir) / "data")

    @property
    def corpora(self) -> dict[str, CorpusConfig]:
        """The corpora by the folder of their tokens in `store_dir`; "": itself."""
        if not self.data.mixture:
            return {"": self.data.corpus}
        return {share.name: share.corpus for share in self.data.mixture}


# --- From files and the command line ------------------------------------------------


def load_config(path: str, overrides: list[str], *, prog: str) -> RunConfig:
    """The `config` of a Python file, with `--dotted.override value` applied.

    Raises InputError if the file is missing, fails, or has no RunConfig. A wrong
    override prints what was meant and exits with status 2 (tyro).
    """
    import tyro

    if not Path(path).is_file():
        raise InputError(
            f"There is no config file {path!r}. A config is a Python file that sets "
            f"`config = RunConfig(...)`; see the folder `configs`."
        )
    config = _variable_of(path, "config", RunConfig)
    check_types(config)
    config, overrides = _with_rules(config, overrides)
    kind = tyro.conf.AvoidSubcommands[RunConfig]  # keeps the file's choice of model
    return tyro.cli(kind, default=config, args=overrides, prog=f"{prog} {path}")


def load_rules(name: str) -> Rules:
    """A preset by its name, or what a Python file sets as `rules = Rules(...)`.

    Raises InputError if it is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_file():
        raise InputError(
            f"rules {name!r}: expected one of {', '.join(PRESETS)}, or a Python file "
            f"that sets `rules = Rules(...)`."
        )
    rules = _variable_of(name, "rules", Rules)
    check_types(rules, "rules.")
    return rules


def _with_rules(config: RunConfig, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    """Takes `--rules NAME` out of the overrides, of which single rules go before it."""
    left = []
    rest = iter(overrides)
    for word in rest:
        flag, equals, name = word.partition("=")
        if flag != "--rules":
            left.append(word)
            continue
        rules = load_rules(name if equals else next(rest, ""))
        compute = dataclasses.replace(config.compute, rules=rules)
        config = dataclasses.replace(config, compute=compute)
    return config, left


def _variable_of(path: str, name: str, kind: type[T]) -> T:
    """A variable that a Python file sets; InputError if the file fails, or has none."""
    sys.path.insert(0, str(Path(path).resolve().parent))  # it may import another
    try:
        value = runpy.run_path(path).get(name)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_of(error, path)
        raise InputError(
            f"{path}{line} fails: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(value, kind):
        raise InputError(f"{path} sets no variable `{name}` that is a {kind.__name__}.")
    return value


def check_types(config: Any, prefix: str = "") -> None:
    """InputError for a field of a config whose value is not of the declared type."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        hint = hints[field.name]
        if not _is_a(value, hint):
            wanted = getattr(hint, "__name__", None) or str(hint)
            wanted = re.sub(r"(\w+\.)+", "", wanted)
            raise InputError(f"{name} = {value!r}: expected {wanted}.")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{name}.")
        for number, item in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(item):
                check_types(item, f"{name}.{number}.")


def _is_a(value: Any, hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin in (tuple, list):  # tuple[str, ...]
        return isinstance(value, origin) and all(_is_a(x, options[0]) for x in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _line_of(error: BaseException, path: str) -> str:
    """ ", line 12": where in the config file it went wrong, if that is known."""
    frame, line = error.__traceback__, ""
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == path:
            line = f", line {frame.tb_lineno},"
        frame = frame.tb_next
    return line
