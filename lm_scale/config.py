# SPDX-License-Identifier: Apache-2.0
"""A run is a `RunConfig`: the parts' configs put together, checked before any work.

A config is a Python file with a variable `config`; `--dotted.override value` on the
command line changes single fields. The resolved config is kept as JSON in the run
directory, where a later process finds it and checks that it goes on with the same run.
"""

import dataclasses
import json
import math
import re
import runpy
import sys
import tempfile
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lm_scale.checkpoint import has_checkpoints
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.errors import InputError, differences, flatten
from lm_scale.models import Compute, GPT2Config, ModelConfig, family_of
from lm_scale.objectives import CausalLM, MaskedLM, Objective
from lm_scale.optim import AdamW, Schedule, make_schedule
from lm_scale.sharding import MeshShape, shards


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, and where the prepared tokens lie."""

    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    separator: bool = True  # an end-of-text token after each document
    store: str | None = None  # folder of tokenizer and tokens; None: <run_dir>/data


@dataclass(frozen=True)
class RunConfig:
    """All there is to say of a training run."""

    run_dir: str  # everything that the run writes is in this folder
    model: ModelConfig = GPT2Config()
    objective: Objective = CausalLM()
    data: DataConfig = DataConfig()
    optimizer: AdamW = AdamW()
    schedule: Schedule = Schedule()
    seq_len: int = 512  # tokens of a sequence
    batch: int = 64  # sequences of a step, all devices and processes together
    accumulate: int = 1  # equal parts of a batch, worked through one after the other
    steps: int | None = None  # optimizer steps; None: as many as `epochs` make
    epochs: float | None = None  # passes over the training split
    seed: int = 42  # of the first weights, the order of the data, masking and dropout
    init_from: str | None = None  # Hugging Face folder to take the first weights from
    mesh: MeshShape = MeshShape()
    compute: Compute = Compute()
    simulated_devices: int = 0  # CPU devices to simulate if there is no accelerator
    log_every: int = 10  # steps between lines in the logs
    eval_every: int | None = None  # steps between evaluations; None: at the end only
    save_every: int | None = 1000  # steps between checkpoints; None: at the end only
    keep: int = 2  # newest checkpoints that stay on disk
    stop_at: int | None = None  # stop and save after this step; without it, go on
    sample_prompt: str | None = None  # continued, or its masks filled in, at the end

    def check(self) -> None:
        """InputError for what cannot work on any devices, before any long work."""
        counts = ("seq_len", "batch", "accumulate", "log_every", "keep")
        optional = ("steps", "epochs", "eval_every", "save_every", "stop_at")
        for name in (*counts, *optional):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} = {value}: expected a number above 0.")
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
        if self.steps is not None:
            make_schedule(self.schedule, self.steps)
        if self.seq_len > self.model.positions:
            raise InputError(
                f"seq_len = {self.seq_len} is longer than the model's position table "
                f"(model.positions = {self.model.positions}). Change one of them."
            )
        causal = family_of(self.model).causal
        if causal != isinstance(self.objective, CausalLM):
            wanted = CausalLM if causal else MaskedLM
            raise InputError(
                f"The model {type(self.model).__name__} needs the objective "
                f"{wanted.__name__}, not {type(self.objective).__name__}."
            )
        self._check_tokenizer()

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

    def check_mesh(self, mesh: Mesh) -> None:
        """InputError if this mesh cannot cut the batch or the sequences evenly."""
        rules = self.compute.rules
        rows = shards(rules, mesh, "batch") * self.accumulate
        if self.batch % rows:
            raise InputError(
                f"batch = {self.batch} cannot be divided evenly: the mesh cuts it into "
                f"{shards(rules, mesh, 'batch')} part(s) ({'×'.join(rules.batch)}) and "
                f"accumulate into {self.accumulate}. Use a multiple of {rows}."
            )
        parts = shards(rules, mesh, "seq")
        if self.seq_len % parts:
            raise InputError(
                f"seq_len = {self.seq_len} cannot be divided evenly: the mesh cuts it "
                f"into {parts} part(s) ({'×'.join(rules.seq)}). "
                f"Use a multiple of {parts}."
            )

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the run, whose training split has so many sequences."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 0.0) * examples / self.batch)

    @property
    def store_dir(self) -> str:
        """Folder that holds `tokenizer`, `train` and `validation`."""
        return self.data.store or str(Path(self.run_dir) / "data")


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
    sys.path.insert(0, str(Path(path).resolve().parent))  # a config may import another
    try:
        config = runpy.run_path(path).get("config")
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_of(error, path)
        raise InputError(
            f"{path}{line} fails: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, RunConfig):
        raise InputError(f"{path} sets no variable `config` that is a RunConfig.")
    check_types(config)
    kind = tyro.conf.AvoidSubcommands[RunConfig]  # keeps the file's choice of model
    return tyro.cli(kind, default=config, args=overrides, prog=f"{prog} {path}")


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


def _is_a(value: Any, hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is tuple:  # tuple[str, ...]
        return isinstance(value, tuple) and all(_is_a(x, options[0]) for x in value)
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


# --- As JSON in the run directory ----------------------------------------------------

# What may change when a run goes on: nothing that alters the result beyond rounding.
# (The tokens in `data.store` are compared by the checkpoint.)
FREE = (
    "run_dir", "mesh", "simulated_devices", "compute.remat", "compute.loss_chunk",
    "compute.rules", "log_every", "eval_every", "save_every", "keep", "stop_at",
    "sample_prompt", "data.store",
)  # fmt: skip


def to_dict(config: Any) -> Any:
    """A config as JSON values; each dataclass carries its name as `type`."""
    if dataclasses.is_dataclass(config):
        fields = dataclasses.fields(config)
        values = {field.name: to_dict(getattr(config, field.name)) for field in fields}
        return {"type": type(config).__name__, **values}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(kind: Any, value: Any) -> Any:
    """The opposite of `to_dict`, for a field of this type."""
    if isinstance(kind, types.UnionType) and isinstance(value, dict):
        kinds = {k.__name__: k for k in typing.get_args(kind) if k is not type(None)}
        kind = kinds[value["type"]]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        make: Any = kind
        return make(
            **{
                name: from_dict(hints[name], value[name])
                for name in names
                if name in value
            }
        )
    return tuple(value) if isinstance(value, list) else value


def read_run(run_dir: str | Path) -> RunConfig:
    """The config of the run in a directory; InputError if there is none."""
    path = Path(run_dir) / "config.json"
    try:
        stored = json.loads(path.read_text())
        return dataclasses.replace(from_dict(RunConfig, stored), run_dir=str(run_dir))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run_dir} holds no run of lm_scale: there is no {path}."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a config of this version of lm_scale ({error!r})."
        ) from error


def check_run_dir(config: RunConfig) -> None:
    """InputError if it cannot be written, or holds a run with another config.

    The message names each field that differs. Fields in FREE may.
    """
    folder = Path(config.run_dir)
    parts = [folder / name for name in ("checkpoints", "tensorboard", "hf")]
    for path in (folder, Path(config.store_dir), *parts):
        if path in parts and not path.exists():
            continue  # they are made when they are needed
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(f"Cannot write to {path}: {error}.") from error
    if not has_checkpoints(folder):
        return  # there is nothing to go on with, and so nothing to mix up
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} has checkpoints but no config.json, so nobody can tell whether "
            f"they belong to this config. Put it back, or give another `run_dir`."
        )
    found = differences(_fixed(read_run(folder)), _fixed(config))
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise InputError(
            f"{folder} holds a run with a different config:\n{listed}\n"
            f"Give another `run_dir`, or the same values to go on with that run."
        )


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The fields, by dotted name, that may not change when a run goes on."""
    fields = flatten(to_dict(config))
    return {
        name: value
        for name, value in fields.items()
        if not any(name == free or name.startswith(f"{free}.") for free in FREE)
    }


def write_config(config: RunConfig) -> None:
    """Keeps the config in the run directory."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "config.json.new"
    new.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    new.replace(folder / "config.json")
