# SPDX-License-Identifier: Apache-2.0
"""A run's config in its directory: as JSON and back, and what may change in it.

`run.json` is where a later process finds the resolved config and checks that it goes on
with the same run.
"""

import dataclasses
import json
import tempfile
import types
import typing
from pathlib import Path
from typing import Any

from lm_scale.checkpoint import has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.errors import InputError, differences, flatten

# What may change when a run goes on: nothing that alters the result beyond rounding.
# (The tokens in `data.store` are compared by the checkpoint.)
FREE = (
    "run_dir", "mesh", "simulated_devices", "compute.remat", "compute.offload",
    "compute.unroll", "compute.loss_chunk", "compute.rules", "compute.attention",
    "log_every", "log_first", "report_to", "eval_every", "eval_batch", "eval_at_end",
    "save_every", "keep", "hub", "stop_at", "sample_prompt", "resume_from",
    "step_limit", "wait_limit", "data.store", "data.cache_dir", "data.workers",
    "data.corpus.streaming",
)  # fmt: skip

# What an evaluation does not depend on, besides.
TRAINING = (
    "optimizer", "schedule", "batch", "accumulate", "steps", "epochs", "init_from",
    "compute",
)  # fmt: skip

# What may differ from one process of a run to another.
OWN = ("data.cache_dir", "data.workers")


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
    path = Path(run_dir) / "run.json"
    try:
        stored = json.loads(path.read_text())
        return dataclasses.replace(from_dict(RunConfig, stored), run_dir=str(run_dir))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run_dir} holds no run of lm_scale: there is no {path}."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a config of this version of lm_scale ({error!r}). Put a "
            f"whole copy there, or give another folder."
        ) from error


def check_run_dir(config: RunConfig, free: tuple[str, ...] = FREE) -> None:
    """InputError if it cannot be written, or holds a run with another config.

    The message names each field that differs; those in `free` may.
    """
    folder = Path(config.run_dir)
    if set("[]") & set(str(folder.absolute())):
        raise InputError(
            f"run_dir = {config.run_dir!r}: the path {folder.absolute()} holds a "
            f"bracket, with which orbax loses checkpoints. Give a path without."
        )
    checkpoints = folder / "checkpoints"  # made when the first one is saved
    cache = [Path(config.data.cache_dir)] if config.data.cache_dir else []
    for path in (folder, Path(config.store_dir), *cache, checkpoints):
        if path == checkpoints and not path.exists():
            continue
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(f"Cannot write to {path}: {error}.") from error
    if config.resume_from is not None:
        check_resume_point(config)
    if has_checkpoints(folder):  # else there is nothing to mix up
        check_same_run(folder, config, free)
    elif config.resume_from is not None:
        check_same_run(resume_point(config.resume_from)[0], config, free)


def resume_point(resume_from: str) -> tuple[Path, int | None]:
    """Run directory and step that `resume_from` means; None: the newest step."""
    path = Path(resume_from).expanduser()
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return path.parent.parent, int(path.name)
    return path, None


def check_resume_point(config: RunConfig) -> None:
    """InputError if `resume_from` names no checkpoint, or an older one of this run."""
    source, step = resume_point(str(config.resume_from))
    folder = source / "checkpoints"
    there = step is None or (folder / str(step)).exists()
    if not (there and has_checkpoints(source)):
        raise InputError(
            f"resume_from = {config.resume_from!r}: expected the folder of a run "
            f"with checkpoints, or one of them (RUN_DIR/checkpoints/STEP)."
        )
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    own = source.resolve() == Path(config.run_dir).resolve()
    if own and step is not None and step < max(steps):
        raise InputError(
            f"resume_from = {config.resume_from!r}: the run has gone on to step "
            f"{max(steps)}. Give another `run_dir` to go on from step {step} there."
        )


def check_same_run(folder: Path, config: RunConfig, free: tuple[str, ...]) -> None:
    """InputError naming each field in which the run there has another config."""
    if not (folder / "run.json").exists():
        raise InputError(
            f"{folder} has checkpoints but no run.json, so nobody can tell whether "
            f"they belong to this config. Put it back, or give another `run_dir`."
        )
    found = differences(_fixed(read_run(folder), free), _fixed(config, free))
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise InputError(
            f"{folder} holds a run with a different config:\n{listed}\n"
            f"Give another `run_dir`, or the same values to go on with that run."
        )


def _fixed(config: RunConfig, free: tuple[str, ...]) -> dict[str, Any]:
    """The fields, by dotted name, that are not in `free`, nor parts of one there."""
    return {
        name: value
        for name, value in flatten(to_dict(config)).items()
        if not any(name == x or name.startswith(f"{x}.") for x in free)
    }


def settings(config: RunConfig) -> dict[str, Any]:
    """The fields, by dotted name, in which all processes of a run must agree."""
    return _fixed(config, OWN)


def write_config(config: RunConfig) -> None:
    """Keeps the config in the run directory."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "run.json.new"
    new.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    new.replace(folder / "run.json")
