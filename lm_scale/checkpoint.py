# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the train state on disk, through Orbax, asynchronously and in shards.

A checkpoint is `<folder>/<step>/` with three items of arrays, `params`, `opt_state` and
`counters`, and the manifest (manifest.py): the hash of each shard that was in memory
among it. It is written last; then only the folder gets its name. Restoring computes the
hashes again, of what has arrived in memory.
"""

import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging as absl_logging
from etils import epath
from jax.sharding import Mesh

from lm_scale import __version__, distributed, manifest
from lm_scale.checkpoint_folder import CheckpointFolder, to_delete
from lm_scale.errors import (
    Diverging,
    InputError,
    StorageError,
    differences,
    one_line,
)
from lm_scale.hashing import by_shard, described, device_hashes, shard_indices, total
from lm_scale.manifest import ArrayFacts, Manifest
from lm_scale.replicas import check_copies
from lm_scale.sharding import Params
from lm_scale.step import TrainState

T = TypeVar("T")
ITEMS = ("params", "opt_state", "counters")
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorstore")
SAVE_LIMIT = 1200  # s that one save may take
GRACE = 10.0  # s that a save waits for the one before; then it is passed over
RETRY, RETRY_AT_MOST = 10.0, 600.0  # s from a failed save to the next try, doubled
LAST_TRIES = (0, 1, 2, 4, 8)  # s before each try of the last save of a run
# What says that storage cannot be reached, and nothing of what is in it.
UNREACHABLE = (
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "CANCELLED",
)  # fmt: skip

# What orbax logs, it raises as well; and of one error it leaves many more unread.
absl_logging.set_verbosity(absl_logging.FATAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class NoneGood(InputError):
    """There are checkpoints, but none that can be used."""


class Damaged(ValueError):
    """A checkpoint cannot be used; the message says why. The same on all processes."""


# --- Restoring ------------------------------------------------------------------------


def restore(
    folder: CheckpointFolder,
    target: TrainState,
    step: int,
) -> tuple[TrainState, Manifest]:
    """The state of a step, onto the mesh of `target`, which is abstract.

    Raises Damaged if what was read is not what was saved, InputError if the arrays
    have other shapes or types than `target`, OSError if storage cannot be reached.
    """
    items, found = _read(folder, step, _items(target))
    return TrainState(
        **items["counters"], params=items["params"], opt_state=items["opt_state"]
    ), found


def restore_newest(
    folder: CheckpointFolder,
    target: TrainState,
    tell: Callable[[str], None],
    *,
    last: int | None = None,
) -> tuple[TrainState, Manifest] | None:
    """The newest good state, not after step `last`; None if there is none at all.

    For the run that owns the folder: a damaged checkpoint is renamed, and told of, and
    the one before it is taken. Raises NoneGood if that was the last; the rest as
    `restore`.
    """
    aside = []
    for step in reversed(distributed.from_first(folder.steps())):
        if last is not None and step > last:
            continue
        try:
            return restore(folder, target, step)
        except Damaged as error:
            first = distributed.index() == 0
            renamed = folder.set_aside(step, "damaged").name if first else None
            renamed = distributed.from_first(renamed)
            aside.append(renamed)
            tell(
                f"WARNING: the checkpoint of step {step} cannot be used: {error}. It "
                f"is now {renamed}. Trying the one before it."
            )
    if aside:
        raise NoneGood(
            f"None of the checkpoints in {folder} is good; nothing was deleted: "
            f"{', '.join(aside)}. Put a good copy there, or start anew with --resume "
            f"fresh or another `run_dir`."
        )
    return None


def restore_step(
    folder: CheckpointFolder, target: TrainState, step: int | None
) -> tuple[TrainState, Manifest]:
    """The state of a step, or the newest good one; changes nothing in the folder.

    Raises InputError if there is none, or it cannot be used; the rest as `restore`.
    """
    return _first_good(folder, step, lambda number: restore(folder, target, number))


def restore_params(
    folder: CheckpointFolder, target: Params, step: int | None = None
) -> Params:
    """The parameters alone; the rest as `restore_step`."""
    return _first_good(
        folder, step,
        lambda number: _read(folder, number, {"params": target})[0]["params"],
    )  # fmt: skip


def _first_good(
    folder: CheckpointFolder, step: int | None, read: Callable[[int], T]
) -> T:
    steps = distributed.from_first(folder.steps())
    if step is not None and step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise InputError(f"There is no checkpoint of step {step} in {folder}; {there}.")
    problems = []
    for number in reversed(steps) if step is None else [step]:
        try:
            return read(number)
        except Damaged as error:
            problems.append(f"that of step {number} cannot be used: {error}")
            if distributed.index() == 0:
                print(f"WARNING: in {folder}, {problems[-1]}.", file=sys.stderr)
    if not problems:
        raise InputError(f"There is no checkpoint in {folder}. Train first.")
    raise NoneGood(f"There is no good checkpoint in {folder}: {problems[0]}.")


def _read(
    folder: CheckpointFolder, step: int, target: dict[str, Any]
) -> tuple[dict[str, Any], Manifest]:
    """These items of a checkpoint, checked; see `restore` for what is raised."""
    if problem := distributed.from_first(_problem(folder, step)):
        raise Damaged(problem)
    distributed.see(folder / step / manifest.NAME)
    found = folder.manifest(step)
    check_arrays(found, _named(target), str(folder / step))
    items, problem = {}, None
    try:
        # Not by a Checkpointer, which ends with all processes waiting for one another:
        # one that cannot read would leave the others there.
        restored: Any = ocp.CompositeCheckpointHandler().restore(
            folder / step, args=_composite(ocp.args.StandardRestore, target)
        )
        items = {name: restored[name] for name in target}
    except Exception as error:  # of which kind, depends on where orbax stumbles
        if not _is_damage(error):
            raise OSError(
                f"Cannot read {folder / step}: {one_line(error, 300)}"
            ) from error
        problem = f"it cannot be read ({one_line(error, 120)})"
    if problem is not None:
        gc.collect()  # coroutines that orbax left half done, noisy when Python ends
    for told in distributed.everyone(problem):
        if told is not None:
            raise Damaged(told)
    if altered := _altered(_named(items), found):
        raise Damaged(altered)
    return items, found


def _is_damage(error: Exception) -> bool:
    """If an error comes from what is stored, and not from how it is reached.

    Orbax raises an Exception of no kind of its own where data cannot be decoded.
    """
    kinds = (ValueError, KeyError, FileNotFoundError)
    text = f"{error} {error.__cause__}"
    reachable = not any(word in text for word in UNREACHABLE)
    return reachable and (type(error) is Exception or isinstance(error, kinds))


def open_array(path: epath.Path, name: str) -> ts.TensorStore:
    """An array of a checkpoint by its path, such as params.blocks.qkv, to be read.

    ValueError if it is not there.
    """
    item, _, rest = name.partition(".")
    where = str(path / item)
    base = f"file://{where}/" if manifest.is_local(path) else f"{where}/"
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{rest}/"}
    once = {"recheck_cached_data": False, "recheck_cached_metadata": False}
    return ts.open({"driver": "zarr", "kvstore": kvstore, **once}, read=True).result()


def _problem(folder: CheckpointFolder, step: int) -> str | None:
    """What process 0 can see is wrong, without reading the arrays."""
    if distributed.index() > 0:
        return None
    try:
        manifest.check_files(folder.manifest(step), folder / step)
    except ValueError as error:
        return str(error)
    return None


def check_arrays(found: Manifest, wanted: Mapping[str, Any], where: str) -> None:
    """InputError naming each array that a checkpoint has otherwise than wanted."""
    items = {path.partition(".")[0] for path in wanted}
    there = {
        path: f"{facts.dtype}{list(facts.shape)}"
        for path, facts in found.arrays.items()
        if path.partition(".")[0] in items
    }
    here = {path: f"{x.dtype}{list(x.shape)}" for path, x in wanted.items()}
    wrong = differences(there, here)
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong[:12])
        more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise InputError(
            f"{where} is not a checkpoint of this model and optimizer:\n{listed}{more}"
            f"\nGive their config, or another `run_dir`."
        )


def _altered(arrays: Mapping[str, jax.Array], found: Manifest) -> str | None:
    """Which of the arrays in memory is not what was saved; None: none of them."""
    for path, shards in _by_shard(arrays, np.asarray(_start_hashes(arrays))).items():
        saved = found.arrays[path].shards
        wrong = [name for name, value in saved.items() if shards.get(name) != value]
        if shards.keys() == saved.keys() and wrong:
            path = f"{path}[{manifest.name_of(wrong[0])}]"
        if total(shards) != total(saved):
            return f"the data of {path} are not what was saved"
    return None


def _start_hashes(arrays: Mapping[str, jax.Array]) -> jax.Array:
    with jax.set_mesh(_mesh_of(arrays)):
        return device_hashes(list(arrays.values()))


def _compile_hashes(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """So that `_start_hashes` of such arrays finds it done."""
    with jax.set_mesh(_mesh_of(arrays)):
        device_hashes.lower(list(arrays.values())).compile()


def _mesh_of(arrays: Mapping[str, Any]) -> Mesh:
    (mesh,) = {x.sharding.mesh for x in arrays.values()}
    return mesh


def _by_shard(
    arrays: Mapping[str, Any], hashes: np.ndarray
) -> dict[str, dict[manifest.Index, int]]:
    return {
        path: by_shard(row, shard_indices(x.sharding, x.shape))
        for (path, x), row in zip(arrays.items(), hashes, strict=True)
    }


def _items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint."""
    counters = {
        name: value
        for name, value in vars(state).items()
        if name not in ("params", "opt_state")
    }
    return {
        "params": state.params,
        "opt_state": state.opt_state,
        "counters": counters,
    }


def _agreed(work: Callable[[], Any]) -> str | None:
    """Does it on each process; what went wrong on the first that failed, for all."""
    problem = None
    try:
        work()
    except Exception as error:
        problem = one_line(error)
    return next((told for told in distributed.everyone(problem) if told), None)


def _composite(kind: Callable[..., Any], items: Mapping[str, Any]) -> Any:
    """Orbax's arguments to save, or restore, these items together."""
    return ocp.args.Composite(**{name: kind(item) for name, item in items.items()})


def _named(items: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by their paths, such as params.blocks.qkv."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): value
        for path, value in jax.tree_util.tree_leaves_with_path(dict(items))
    }


# --- Saving ---------------------------------------------------------------------------


class Saver:
    """Writes a run's checkpoints, one at a time, in the background.

    All processes call the same methods in the same order. A failed save ends nothing:
    `poll` tells of it, and `due` says when to try again. Only the last one, `finish`,
    raises for that. A context manager: leaving waits for what is being written.

    Args:
        keep, keep_every, keep_best: see `to_delete`.
        config, tokens: go into each manifest.
        tell: gets each line for a person.
        noted: called with the step when a checkpoint is whole, on process 0.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        keep_best: bool = False,
        config: Mapping[str, Any] | None = None,
        tokens: Mapping[str, Any] | None = None,
        tell: Callable[[str], None] = print,
        noted: Callable[[int], None] = lambda step: None,
    ):
        self.folder, self.tell, self.noted = folder, tell, noted
        self.retention = {
            "keep": keep, "keep_every": keep_every, "keep_best": keep_best,
        }  # fmt: skip
        self.config, self.tokens = dict(config or {}), dict(tokens or {})
        self.saved: int | None = None  # the newest step that is on disk
        self.failures = 0  # saves that have failed since one has not
        self.passed_over = 0  # saves that were due while another was being written
        self._losses: dict[int, float | None] = {}  # of our checkpoints, on process 0
        self._retry_at = math.inf
        self._running: tuple[int, float, Future] | None = None  # step, start, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._number = 0  # of saves that were begun
        self._ready: Future[None] | None = None  # when the hashes are compiled
        self._seal: Callable[[], None] = lambda: None
        # zstd would take a core 1.7 s a GB, and leave 7 % out (benchmarks/step).
        plain: Any = {
            item: ocp.PyTreeCheckpointHandler(use_compression=False) for item in ITEMS
        }
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**plain),
            async_options=ocp.AsyncOptions(
                timeout_secs=SAVE_LIMIT,
                barrier_sync_fn=self._meet if distributed.count() > 1 else None,
                # When all processes have written, and before the folder has its name.
                post_finalization_callback=lambda: self._seal(),
            ),
        )

    def __enter__(self) -> "Saver":
        if distributed.index() == 0:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.clean()
        return self

    def __exit__(self, kind, *exception) -> None:
        # After a failure of one process it would wait for others that may be dead.
        if kind is None or distributed.count() == 1:
            self.wait()
            self._checkpointer.close()
        self._thread.shutdown(wait=False)

    def get_ready(self, state: TrainState) -> None:
        """Compiles, in a thread, what a save runs on the devices: it need not wait."""
        arrays = described(_named(_items(state)))
        self._ready = self._thread.submit(_compile_hashes, arrays)

    def adopt(self, step: int) -> None:
        """Begins with what is in the folder, of which that step was just restored."""
        self.saved = step
        if distributed.index() == 0:
            found = self.folder.manifests()
            self._losses = {step: x.eval_loss for step, x in found.items()}

    def save(
        self,
        state: TrainState,
        *,
        eval_loss: float | None = None,
        left_out: tuple[tuple[int, int], ...] = (),
        stream: dict[str, Any] | None = None,
    ) -> None:
        """Starts to write the state; returns when it is copied and may be donated.

        eval_loss: the held-out loss of these weights. left_out, stream: see `Manifest`.
        Passes over a save that is due while another is still being written.
        """
        self.poll()
        step = int(state.step)
        if distributed.from_first(step == self.saved):
            return
        if any(distributed.everyone(self._busy(step))):
            return
        self.poll()  # the one before may have ended, or failed, only now
        if eval_loss is not None and not math.isfinite(eval_loss):
            eval_loss = None
        items = _items(state)
        hashes: Future[jax.Array] = Future()
        about = {"eval_loss": eval_loss, "left_out": left_out, "stream": stream}
        self._seal = self._sealing(step, items, hashes, about)
        self._number += 1
        start = time.monotonic()
        first = distributed.index() == 0
        problem = _agreed(lambda: self.folder.make_way(step) if first else None)
        problem = problem or _agreed(
            lambda: self._checkpointer.save(
                self.folder / step, args=_composite(ocp.args.PyTreeSave, items)
            )
        )
        if problem is None:
            if self._ready is not None:
                wait([self._ready])
            # After the copying, with which it would compete; the devices come to it
            # before the next step.
            hashes.set_result(_start_hashes(_named(items)))
        else:  # what another process has begun must not wait for this one
            hashes.set_exception(OSError(problem))
            distributed.give_up(self._failed, problem)
        ended = self._thread.submit(self._conclude, step, eval_loss, problem)
        self._running = step, start, ended

    @property
    def _failed(self) -> str:
        """The key by which processes tell that they cannot end the present save."""
        return f"save/{self._number}/failed"

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier between the processes that write a checkpoint."""
        distributed.meet(f"save/{key}", self._failed, timeout_ms / 1000)

    def _sealing(
        self,
        step: int,
        items: Mapping[str, Any],
        hashes: "Future[jax.Array]",
        about: dict[str, Any],
    ) -> Callable[[], None]:
        """What writes the manifest, `about` in it, when all data are written."""
        shapes = described(_named(items))  # the arrays are donated next

        def seal() -> None:
            found = np.asarray(hashes.result())
            check_copies(step, shapes, found)
            facts = {
                path: ArrayFacts(shapes[path].shape, str(shapes[path].dtype), shards)
                for path, shards in _by_shard(shapes, found).items()
            }
            versions = {name: version(name) for name in LIBRARIES}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            filled = Manifest(
                step=step, time=now, config=self.config, tokens=self.tokens,
                arrays=facts, files={}, versions={"lm_scale": __version__, **versions},
                **about,
            )  # fmt: skip
            manifest.write(filled, self.folder.being_written(step))

        return seal

    def _busy(self, step: int) -> bool:
        """If another save is under way, and does not end soon; tells so."""
        if self._running is None or self._running[0] == step:
            return self._running is not None
        other, start, ended = self._running
        wait([ended], timeout=GRACE)
        if ended.done():
            return False
        self.passed_over += 1
        self.tell(
            f"Step {step} is not saved: step {other} is still being written, since "
            f"{time.monotonic() - start:.0f} s ({self.passed_over} passed over so far)."
        )
        return True

    def _conclude(self, step: int, eval_loss: float | None, problem: str | None):
        """In a thread: waits for the writing, then lets older checkpoints go."""
        try:
            self._checkpointer.wait_until_finished()
            if problem is not None:
                raise OSError(problem)
        except BaseException as error:
            distributed.give_up(self._failed, one_line(error, 300))
            if distributed.index() == 0:  # it takes space that the next try needs
                self._remove_unfinished()
            raise
        if distributed.index() > 0:
            return
        self._losses[step] = eval_loss
        # Whatever goes wrong from here on, the checkpoint is whole.
        try:
            self.noted(step)
        except Exception as error:
            self.tell(f"WARNING: step {step} was saved, but {one_line(error, 200)}")
        for old in to_delete(self._losses, **self.retention):
            del self._losses[old]
            try:
                self.folder.delete(old)
            except FileNotFoundError:
                pass  # somebody else has let it go
            except Exception as error:
                self.tell(f"WARNING: step {old} stays on disk: {one_line(error, 200)}")

    def _remove_unfinished(self) -> None:
        try:
            self.folder.clean()
        except OSError:
            pass

    def poll(self) -> None:
        """Tells of a save that has failed since the last call; never waits.

        Raises Diverging if copies of the state were not the same: it was not saved.
        """
        if self._running is None or not self._running[2].done():
            return
        (step, _, ended), self._running = self._running, None
        error = ended.exception()
        if error is None:
            self.saved, self.failures = step, 0
            return
        if isinstance(error, Diverging):  # another try would save the same
            raise error
        self.failures += 1
        pause = min(RETRY * 2 ** (self.failures - 1), RETRY_AT_MOST)
        self._retry_at = time.monotonic() + pause
        text = (
            f"WARNING: step {step} could NOT be saved ({one_line(error, 300)}). The "
            f"newest checkpoint is {self._newest()}. The run goes on, and tries again "
            f"in {pause:.0f} s."
        )
        self.tell(text)
        if distributed.index() > 0:  # whose `tell` may be silent
            print(f"{distributed.prefix()}{text}", file=sys.stderr, flush=True)

    @property
    def idle(self) -> bool:
        """If nothing is being written, as far as this process knows."""
        return self._running is None

    @property
    def due(self) -> bool:
        """If a save has failed, long enough ago to try again."""
        return self.failures > 0 and self.idle and time.monotonic() >= self._retry_at

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._running is not None:
            wait([self._running[2]])
        self.poll()

    def finish(self, state: TrainState, **facts: Any) -> None:
        """Saves the state, if it is not, and waits; `facts` as for `save`.

        Raises StorageError when it could not be saved after several tries.
        """
        step = int(state.step)
        for pause in LAST_TRIES:
            self.wait()
            if all(distributed.everyone(self.saved == step)):
                return
            time.sleep(pause)
            self.save(state, **facts)
        self.wait()
        if not all(distributed.everyone(self.saved == step)):
            raise StorageError(
                f"Step {step}, the last, could not be saved in {self.folder}: what is "
                f"wrong is said above. The newest checkpoint is {self._newest()}; the "
                f"same command goes on from there."
            )

    def _newest(self) -> str:
        return "none" if self.saved is None else f"step {self.saved}"

    def forget_after(self, step: int) -> None:
        """Sets aside the checkpoints after a step: the run goes on from there."""
        self.wait()
        self.saved = step
        if distributed.index() == 0:
            for later in [s for s in reversed(self.folder.steps()) if s > step]:
                self.folder.set_aside(later, "rolled-back")
                self._losses.pop(later, None)
        distributed.from_first(None)
