# SPDX-License-Identifier: Apache-2.0
"""A run's config in its directory: as JSON and back, and what may change in it.

`run.json` is where a later process finds the resolved config and checks that it goes on
with the same run.
"""

import dataclasses
import difflib
import json
import tempfile
import types
import typing
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console

from lm_scale.changes import Changes, compare, covers, without_numbers
from lm_scale.checkpoint_folder import CheckpointFolder, has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.console import say
from lm_scale.errors import InputError, flatten
from lm_scale.manifest import is_local
from lm_scale.models import build_model
from lm_scale.sharding import declarations

# What may change when a run goes on: nothing that alters the result beyond rounding.
# (The tokens in `data.store` are compared by their fingerprint.)
FREE = (
    "run_dir", "mesh", "slice", "simulated_devices", "compute.remat", "compute.offload",
    "compute.reshard_after_forward", "compute.unroll", "compute.loss_chunk",
    "compute.rules", "compute.attention",
    "log_every", "log_first", "report_to", "eval_every", "eval_batch", "eval_at_end",
    "save_every", "keep", "keep_every", "keep_best", "checkpoint_dir", "resume", "hub",
    "stop_at", "sample_prompt", "resume_from", "step_limit", "wait_limit", "override",
    "guard", "data.store", "data.cache_dir", "data.workers", "data.corpus.streaming",
    "data.mixture.corpus.streaming",
)  # fmt: skip

# What of these says nothing about what the run does from here on.
SILENT = (
    "run_dir", "slice", "simulated_devices", "stop_at", "resume_from", "override",
    "resume", "checkpoint_dir", "data.store", "data.cache_dir", "data.workers",
)  # fmt: skip

# What an evaluation does not depend on, besides.
TRAINING = (
    "optimizer", "schedule", "batch", "accumulate", "steps", "epochs", "init_from",
    "init", "compute",
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
    if isinstance(value, list):
        tuples = [k for k in (kind, *typing.get_args(kind)) if _is_tuple(k)]
        (item, *_) = typing.get_args(tuples[0]) if tuples else (Any,)
        return tuple(from_dict(item, each) for each in value)
    return value


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


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

    The message names each field that differs; those in `free` and `override` may.
    """
    check_override(config)
    folder = Path(config.run_dir)
    check_brackets("run_dir", config.run_dir)
    check_brackets("checkpoint_dir", config.checkpoint_dir or "")
    cache = [Path(config.data.cache_dir)] if config.data.cache_dir else []
    checkpoints = epath.Path(config.checkpoints)
    if is_local(checkpoints) and checkpoints.exists():  # made with the first one
        cache.append(Path(checkpoints))
    for path in (folder, Path(config.store_dir), *cache):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(f"Cannot write to {path}: {error}.") from error
    if config.resume_from is not None:
        check_resume_point(config)
    there = former(config)
    if there is not None:
        check_changes(there, config, _newest(config), free=free)


def check_brackets(name: str, value: str) -> None:
    """InputError if a folder's path holds a bracket."""
    path = str(Path(value).absolute())
    if set("[]") & set(path):
        raise InputError(
            f"{name} = {value!r}: the path {path} holds a bracket, with which orbax "
            f"loses checkpoints. Give a path without."
        )


def check_override(config: RunConfig) -> None:
    """InputError for a name in `override` that no field has, of no kind of config."""
    known = field_names(RunConfig) | {"tokens"}
    of_tokens = ("tokenizer", "number", "sha256", "shards", "files")
    known |= {f"tokens.{name}" for name in of_tokens}
    for share in config.data.mixture:
        of_one = ("number", "sha256", "share")
        known |= {f"tokens.{share.name}.{name}" for name in of_one}
    for name in config.override:
        if name not in known and without_numbers(name) not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            near += [x for x in sorted(known) if x.endswith(f".{name}")]
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"override names {name!r}, which is no field of a config: expected "
                f"names such as 'batch', 'schedule.peak' or 'tokens'.{hint}"
            )


def field_names(kind: Any, prefix: str = "") -> set[str]:
    """The dotted names of a config's fields, whichever kinds its parts are of."""
    names = set()
    for name, hint in typing.get_type_hints(kind).items():
        names.add(prefix + name)
        for part in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(part):
                names |= {f"{prefix}{name}.type"}
                names |= field_names(part, f"{prefix}{name}.")
    return names


def resume_point(resume_from: str) -> tuple[Path, int | None]:
    """Run directory and step that `resume_from` means; None: the newest step."""
    path = Path(resume_from).expanduser()
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return path.parent.parent, int(path.name)
    return path, None


def checkpoints_of(run_dir: Path) -> CheckpointFolder:
    """The checkpoints of a run, by its folder."""
    known = (run_dir / "run.json").exists()
    own = read_run(run_dir).checkpoints if known else run_dir / "checkpoints"
    return CheckpointFolder(own)


def check_resume_point(config: RunConfig) -> None:
    """InputError if `resume_from` names no checkpoint, or an older one of this run."""
    source, step = resume_point(str(config.resume_from))
    steps = checkpoints_of(source).steps()
    if not steps or step not in (None, *steps):
        raise InputError(
            f"resume_from = {config.resume_from!r}: expected the folder of a run "
            f"with checkpoints, or one of them (RUN_DIR/checkpoints/STEP)."
        )
    own = source.resolve() == Path(config.run_dir).resolve()
    if own and step is not None and step < max(steps):
        raise InputError(
            f"resume_from = {config.resume_from!r}: the run has gone on to step "
            f"{max(steps)}. Give another `run_dir` to go on from step {step} there."
        )


# --- Going on -------------------------------------------------------------------------


def former(config: RunConfig) -> dict[str, Any] | None:
    """The config, as JSON values, of the run that this one goes on with.

    None: it begins anew. InputError if nobody knows of which run the checkpoints are.
    """
    run_dir, folder, _ = _source(config)
    if folder is None:
        return None
    if (run_dir / "run.json").exists():
        return to_dict(read_run(run_dir))
    # On a new machine only the checkpoints, in an object store, may be there.
    found = folder.manifests()
    if not found:
        raise InputError(
            f"{folder} has checkpoints, but {run_dir} no run.json, so nobody can tell "
            f"whether they belong to this config. Put it back, or give another "
            f"`run_dir`."
        )
    return found[max(found)].config


def _source(config: RunConfig) -> tuple[Path, CheckpointFolder | None, int | None]:
    """The run to go on with: its folder, its checkpoints, and the step, if named."""
    if has_checkpoints(config.checkpoints):  # else there is nothing to mix up
        return Path(config.run_dir), CheckpointFolder(config.checkpoints), None
    if config.resume_from is not None:
        run_dir, step = resume_point(config.resume_from)
        return run_dir, checkpoints_of(run_dir), step
    return Path(config.run_dir), None, None


def _newest(config: RunConfig) -> int:
    """The step to go on from, of a run that has checkpoints."""
    _, folder, step = _source(config)
    assert folder is not None
    return max(folder.steps()) if step is None else step


def check_changes(
    there: dict[str, Any],
    config: RunConfig,
    step: int,
    tokens: dict[str, Any] | None = None,
    *,
    free: tuple[str, ...] = FREE,
) -> Changes:
    """What has changed since the run was at this step, where it had the config `there`.

    there: JSON values (`to_dict`), with the fingerprint of the tokens that the run was
    trained on as `tokens`, if it is known. tokens: the fingerprint of those of now.
    Raises InputError naming what may not change, being neither in `free` nor named by
    `override`, nor a greater length of the run, and what no override can change.
    """
    was = from_dict(RunConfig, there)
    changes = compare(
        {**to_dict(was), "tokens": there.get("tokens", tokens)},
        {**to_dict(config), "tokens": tokens},
        config.override,
        free=free, silent=SILENT, fixed=_unchangeable(was, config), step=step,
    )  # fmt: skip
    if changes.refused:
        listed = "\n".join(f"  {line}" for line in changes.refused)
        raise InputError(
            f"{_source(config)[0]} holds a run with a different config:\n{listed}\n"
            f"Give another `run_dir`, or the same values to go on with that run."
            f"{_advice(changes)}"
        )
    return changes


def _unchangeable(was: RunConfig, config: RunConfig) -> dict[str, str]:
    """The parts of the config that the checkpoint cannot be read into, and why not."""
    found = {}
    if type(was.optimizer) is not type(config.optimizer):
        found["optimizer"] = "its state is of another kind"
    if _shapes(was) != _shapes(config):
        found["model"] = "its weights have other shapes"
    if was.data.stream and config.data.stream:
        counted = "the place in the stream is counted by it"
        found |= {f"data.stream_{name}": counted for name in ("lanes", "buffer")}
    return found


def _shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    weights = declarations(build_model(config.model, config.compute))
    return {path: weight.get_value().shape for path, weight in weights.items()}


def _advice(changes: Changes) -> str:
    """How to go on in spite of what is refused."""
    advice = ""
    if any(covers(["tokens"], name) for name in changes.overridable):
        advice += (
            " It was trained on other tokens: restore the token store that the run "
            "belongs to."
        )
    if changes.overridable:
        advice += (
            f" Where it is meant, `--override {' '.join(changes.overridable)}` allows "
            f"it, and run.json keeps a record."
        )
    return advice


def announce(changes: Changes, console: Console) -> None:
    """Prints what has changed; nothing if nothing has."""
    if changes.announced:
        say(console, "Changed since then:")
    for line in changes.announced:
        say(console, f"  {line}")


# --- The file -------------------------------------------------------------------------


def _fixed(config: RunConfig, free: tuple[str, ...]) -> dict[str, Any]:
    """The fields, by dotted name, that are not in `free`, nor parts of one there."""
    return {
        name: value
        for name, value in flatten(to_dict(config)).items()
        if not covers(free, name)
    }


def settings(config: RunConfig) -> dict[str, Any]:
    """The fields, by dotted name, in which all processes of a run must agree."""
    return _fixed(config, OWN)


def write_config(
    config: RunConfig, step: int = 0, changes: Changes | None = None
) -> None:
    """Keeps the config in the run directory, with the changes that were ever made.

    step: where the run is. changes: those since it was there before; None: it begins.
    They go into the list `changes`, in which what is noted of this step and of later
    ones is from an attempt that was not saved, and is dropped.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    history = []
    if changes is not None and path.exists():
        history = json.loads(path.read_text()).get("changes", [])
        history = [entry for entry in history if entry["step"] < step]
    if changes is not None and changes.made:
        history.append({"step": step, "changes": changes.made})
    _replace(path, {**to_dict(config), "changes": history})


def noted(run_dir: str | Path) -> dict[str, Any]:
    """What the run has noted of itself in `saved.json`; empty if it was never saved.

    step: the newest of which it ever had a checkpoint. left_out, rollbacks: the batches
    that it leaves out, and how often it has gone back. Raises InputError if the file
    cannot be read: nobody knows then whether the run may begin anew.
    """
    path = Path(run_dir) / "saved.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}). If the run's checkpoints are in place, "
            f"delete it."
        ) from error
    return found


def forget(run_dir: str | Path) -> None:
    """Deletes what `noted` says: the run begins anew."""
    (Path(run_dir) / "saved.json").unlink(missing_ok=True)


def note(run_dir: str | Path, **facts: Any) -> None:
    """Adds to what `noted` says."""
    _replace(Path(run_dir) / "saved.json", {**noted(run_dir), **facts})


def _replace(path: Path, content: Any) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=2) + "\n")
    new.replace(path)
