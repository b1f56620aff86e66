# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is damaged is seen, named and kept; what is good is found."""

import json
import re
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from lm_scale import checkpoint, manifest
from lm_scale.checkpoint import (
    NoneGood,
    Saver,
    restore_newest,
    restore_params,
    restore_step,
)
from lm_scale.checkpoint_folder import CheckpointFolder, to_delete
from lm_scale.errors import InputError, StorageError
from lm_scale.step import TrainState

MESHES = {
    "data=8": ((8,), ("data",)),
    "fsdp=4": ((4,), ("fsdp",)),
    "data=2 tensor=2": ((2, 2), ("data", "tensor")),
    "1 device": ((1,), ("data",)),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes, axes = MESHES[name]
    devices = jax.devices()[: int(np.prod(sizes))]
    types = (AxisType.Explicit,) * len(axes)
    return jax.make_mesh(sizes, axes, axis_types=types, devices=devices)


def values(step: int, **changed) -> dict:
    """The content of a state, as numpy."""
    rng = np.random.default_rng(step)
    w = rng.normal(size=(64, 1024)).astype(np.float32)
    params = {"blocks": {"w": w, "b": rng.normal(size=8).astype(np.float32)}}
    moments = jax.tree.map(lambda x: (x * 0.5).astype(jnp.bfloat16), params)
    return {
        "step": np.int32(step), "skipped": np.int32(0), "params": params | changed,
        "opt_state": (np.int32(step), {"mu": moments}),
    }  # fmt: skip


def state_on(name: str, step: int, **changed) -> TrainState:
    """The state of a step, its arrays cut over the mesh's first axis where possible."""
    mesh = mesh_of(name)

    def place(x):
        parts = mesh.devices.shape[0]
        cut = np.ndim(x) and np.shape(x)[0] % parts == 0
        spec = jax.P(mesh.axis_names[0]) if cut else jax.P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return TrainState(**jax.tree.map(place, values(step, **changed)))


def target_on(name: str, **changed) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state_on(name, 0, **changed),
    )


def assert_is(state: TrainState, step: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, vars(state), values(step))


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


@pytest.fixture
def told() -> list[str]:
    return []


def save(folder, *steps: int, mesh: str = "data=8", tell=print, **options) -> Saver:
    saver = Saver(folder, tell=tell, config={"batch": 16}, **options)
    with saver:
        for step in steps:
            saver.save(state_on(mesh, step))
            saver.wait()
    return saver


def newest(folder, tell=print, mesh: str = "data=8"):
    return restore_newest(folder, target_on(mesh), tell)


# --- Good ones ------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_what_was_saved_comes_back_on_any_mesh(folder, mesh):
    save(folder, 1, 2)
    found = newest(folder, mesh=mesh)
    assert found is not None
    state, facts = found
    assert_is(state, 2)
    assert facts.step == 2 and facts.config == {"batch": 16}
    assert facts.versions.keys() >= {"lm_scale", "jax", "orbax-checkpoint"}
    target = jax.tree.leaves(target_on(mesh))
    assert [x.sharding for x in jax.tree.leaves(state)] == [x.sharding for x in target]


def test_nothing_is_compressed(folder):
    save(folder, 1)
    names = list(folder.manifest(1).arrays)
    assert {name.partition(".")[0] for name in names} == set(checkpoint.ITEMS)
    for name in names:
        codec = checkpoint.open_array(folder / 1, name).codec.to_json()
        assert codec["compressor"] is None


def test_a_save_compiles_nothing_that_was_made_ready(folder, caplog):
    # Of shapes that no other test has: a process compiles once.
    state = state_on("data=8", 1, ready=np.ones((8, 31), np.float32))
    other = state_on("data=8", 2, ready=np.ones((8, 37), np.float32))
    with Saver(folder) as saver:
        saver.get_ready(state)
        assert saver._ready is not None
        saver._ready.result()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            saver.save(state)
            saver.wait()
            assert "device_hashes" not in caplog.text
            saver.save(other)
            assert "device_hashes" in caplog.text


def test_parameters_alone(folder):
    save(folder, 1, 2)
    for step in (1, 2):
        params = restore_params(folder, target_on("fsdp=4").params, step)
        jax.tree.map(np.testing.assert_array_equal, params, values(step)["params"])
    with pytest.raises(InputError, match="no checkpoint of step 7 .* there are 1, 2"):
        restore_params(folder, target_on("fsdp=4").params, 7)


def test_no_checkpoints_at_all(folder, told):
    assert newest(folder, told.append) is None and told == []
    with pytest.raises(InputError, match="Train first"):
        restore_step(folder, target_on("data=8"), None)


def test_a_state_may_be_donated_while_it_is_written(folder):
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0
    )  # as the next train step does
    with jax.set_mesh(mesh_of("data=8")), Saver(folder) as saver:
        state = state_on("data=8", 3)
        saver.save(state)
        jax.block_until_ready(overwrite(state))
    assert_is(newest(folder)[0], 3)


def test_saving_a_step_again_does_nothing(folder):
    with Saver(folder) as saver:
        saver.save(state_on("data=8", 3))
        saver.save(state_on("data=8", 3))
        saver.finish(state_on("data=8", 3))
        assert saver.saved == 3 and saver.passed_over == 0


# --- Damaged ones ---------------------------------------------------------------------


def largest(path: Path) -> Path:
    files = [p for p in path.rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda p: flip(largest(p / "params")), "not what was saved"),
    "a flipped bit of the optimizer": (
        lambda p: flip(largest(p / "opt_state")), "not what was saved|been altered",
    ),
    "zeros": (
        lambda p: largest(p).write_bytes(bytes(largest(p).stat().st_size)),
        "cannot be read|not what was saved",
    ),
    "a truncated file": (
        lambda p: largest(p).write_bytes(largest(p).read_bytes()[:-7]),
        "bytes instead of",
    ),
    "a deleted file": (lambda p: largest(p).unlink(), "is missing"),
    "a broken index": (lambda p: flip(p / "params/manifest.ocdbt"), "been altered"),
    "no index": (lambda p: (p / "params/manifest.ocdbt").unlink(), "is missing"),
    "half deleted": (lambda p: shutil.rmtree(p / "opt_state"), "is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "was never finished"),
    "an altered manifest": (lambda p: flip(p / "manifest.json"), "manifest.json"),
    "an empty folder": (
        lambda p: (shutil.rmtree(p), p.mkdir()), "was never finished",
    ),
}  # fmt: skip


@pytest.fixture
def unhashed(monkeypatch):
    """Files are too large to be hashed as a whole, as those of real models are."""
    monkeypatch.setattr(manifest, "SMALL", 2**16)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(folder, damage, told, unhashed):
    save(folder, 1, 2)
    harm, reason = DAMAGE[damage]
    harm(Path(folder / 2))
    found = newest(folder, told.append)
    assert_is(found[0], 1)
    (line,) = told
    assert line.startswith("WARNING: the checkpoint of step 2 cannot be used: ")
    assert re.search(reason, line), line
    assert "It is now 2.damaged" in line
    assert folder.steps() == [1] and (folder.path / "2.damaged").exists()


def test_the_message_names_the_array(folder, told, unhashed):
    save(folder, 1, 2)
    flip(largest(Path(folder / 2 / "params")))
    newest(folder, told.append)
    assert "the data of params.blocks.w[" in told[0]


def test_all_damaged_stops(folder, told):
    save(folder, 1, 2)
    for step in (1, 2):
        Path(folder / step / "manifest.json").unlink()
    with pytest.raises(NoneGood, match=r"2\.damaged, 1\.damaged.*--resume fresh"):
        newest(folder, told.append)
    assert len(told) == 2


def test_reading_only_changes_nothing(folder, capsys):
    save(folder, 1, 2)
    Path(folder / 2 / "manifest.json").unlink()
    params = restore_params(folder, target_on("data=8").params)
    jax.tree.map(np.testing.assert_array_equal, params, values(1)["params"])
    assert folder.steps() == [1, 2]
    assert "WARNING" in capsys.readouterr().err
    with pytest.raises(InputError, match="that of step 2 cannot be used"):
        restore_params(folder, target_on("data=8").params, 2)


def test_storage_that_cannot_be_reached_is_no_damage(folder, monkeypatch):
    save(folder, 1)

    def unreachable(*_, **__):
        raise ValueError("UNAVAILABLE: connection reset")

    monkeypatch.setattr(
        checkpoint.ocp.CompositeCheckpointHandler, "restore", unreachable
    )
    with pytest.raises(OSError, match="Cannot read .*connection reset"):
        newest(folder)
    assert folder.steps() == [1]


def test_another_model_is_refused_and_nothing_renamed(folder):
    save(folder, 1)
    wide = {"blocks": {"w": np.zeros((64, 512), np.float32), "c": np.zeros(8)}}
    with pytest.raises(InputError) as error:
        restore_newest(folder, target_on("data=8", **wide), print)
    text = str(error.value)
    assert "params.blocks.w: 'float32[64, 1024]' there, 'float32[64, 512]' here" in text
    assert "params.blocks.b: 'float32[8]' there, None here" in text
    assert "params.blocks.c: None there" in text
    assert folder.steps() == [1]


def test_another_type_is_refused(folder):
    """Orbax would cast it."""
    save(folder, 1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), values(0)["params"])
    with pytest.raises(InputError, match="'float32.8.' there, 'bfloat16.8.' here"):
        restore_newest(folder, target_on("data=8", **half), print)


# --- Foreign ones ---------------------------------------------------------------------


def test_foreign_entries_are_neither_chosen_nor_deleted(folder, tmp_path):
    save(folder, 1)
    path = Path(folder.path)
    (path / "100.backup").mkdir()
    (path / "100.backup" / "mine").write_text("mine")
    (path / "12").write_text("a file")
    shutil.copytree(path / "1", tmp_path / "elsewhere")
    (path / "9").symlink_to(tmp_path / "elsewhere")
    (path / "notes").mkdir()
    assert_is(newest(folder)[0], 1)
    saver = save(folder, 2, 3, 9, 12, keep=1)
    assert saver.failures == 0
    kept = {p.name for p in path.iterdir()}
    assert kept >= {"100.backup", "12.foreign", "9.foreign", "notes", "12"}
    assert (tmp_path / "elsewhere" / "manifest.json").exists()


def test_what_a_killed_save_or_deletion_left_is_removed(folder):
    save(folder, 1)
    for name in ("2.orbax-checkpoint-tmp", "0.deleting"):
        (folder.path / name).mkdir()
    (folder.path / "x.orbax-checkpoint-tmp").mkdir()  # not ours
    assert newest(folder) is not None
    save(folder, 2)
    names = {p.name for p in folder.path.iterdir()}
    assert names == {"1", "2", "x.orbax-checkpoint-tmp"}


# --- Retention ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"keep": 2}, [10, 20, 30]),
        ({"keep": None}, []),
        ({"keep": 1, "keep_every": 20}, [10, 30]),
        ({"keep": 1, "keep_best": True}, [10, 30, 40]),
    ],
)
def test_which_may_go(options, gone):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 1.5}
    options = {"keep_every": None, "keep_best": False, **options}
    assert to_delete(losses, **options) == gone


def test_kept_ones_are_known_after_a_restart(folder):
    with Saver(folder, keep=1, keep_best=True) as saver:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
            saver.save(state_on("data=8", step), eval_loss=loss)
            saver.wait()
    assert folder.steps() == [2, 3]
    with Saver(folder, keep=1, keep_best=True) as saver:
        saver.adopt(3)
        saver.save(state_on("data=8", 4), eval_loss=float("nan"))
        saver.wait()
        assert folder.steps() == [2, 4]
        assert folder.manifest(4).eval_loss is None


# --- Storage trouble ------------------------------------------------------------------


def test_a_failed_save_is_told_at_once_and_tried_again(
    folder, failing, told, monkeypatch
):
    monkeypatch.setattr(checkpoint, "RETRY", 0.0)
    with Saver(folder, keep=1, tell=told.append) as saver:
        saver.save(state_on("data=8", 1))
        saver.wait()
        failing(1)
        saver.save(state_on("data=8", 2))
        assert checkpoint.wait([saver._running[2]], timeout=60).done
        saver.poll()
        (line,) = told
        assert line.startswith("WARNING: step 2 could NOT be saved (")
        assert "No space left on device" in line
        assert "The newest checkpoint is step 1." in line
        # What failed takes no space, and what was good is not let go.
        assert [p.name for p in folder.path.iterdir()] == ["1"]
        assert saver.due
        saver.save(state_on("data=8", 3))
        saver.wait()
        assert not saver.due and saver.saved == 3 and folder.steps() == [3]


def test_the_last_save_is_tried_several_times(folder, failing, told):
    failing(2)
    with Saver(folder, tell=told.append) as saver:
        saver.finish(state_on("data=8", 5))
    assert len(told) == 2 and folder.steps() == [5]


def test_a_last_save_that_fails_for_good_raises(folder, failing, told):
    with Saver(folder, tell=told.append) as saver:
        saver.save(state_on("data=8", 4))
        saver.wait()
        failing(100)
        with pytest.raises(StorageError, match="Step 5, .*newest checkpoint is step 4"):
            saver.finish(state_on("data=8", 5))
    assert folder.steps() == [4]


def test_slow_storage_is_never_written_to_twice_at_once(folder, told, monkeypatch):
    monkeypatch.setattr(checkpoint, "GRACE", 0.0)
    write, go_on = manifest.write, threading.Event()
    monkeypatch.setattr(manifest, "write", lambda *x: (go_on.wait(60), write(*x)))
    with Saver(folder, tell=told.append) as saver:
        for step in (1, 2, 3):
            saver.save(state_on("data=8", step))  # returns
        assert saver.passed_over == 2
        assert told[0].startswith("Step 2 is not saved: step 1 is still being written")
        go_on.set()
        saver.finish(state_on("data=8", 3))
    assert folder.steps() == [1, 3]


# --- The manifest ---------------------------------------------------------------------


def test_a_manifest_of_another_format_says_so(folder):
    save(folder, 1)
    path = Path(folder / 1 / "manifest.json")
    body = json.loads(path.read_text())
    body.pop("digest")
    body["format"] = 99
    path.write_text(json.dumps({**body, "digest": manifest._digest(body)}))
    with pytest.raises(ValueError, match="has format 99, this version .* reads 1"):
        folder.manifest(1)


def test_a_renamed_checkpoint_says_so(folder):
    save(folder, 1)
    Path(folder / 1).rename(folder / 8)
    with pytest.raises(ValueError, match="it holds step 1: it was renamed"):
        folder.manifest(8)


def test_every_shard_has_its_hash(folder):
    save(folder, 1, mesh="data=2 tensor=2")
    facts = folder.manifest(1).arrays["params.blocks.w"]
    assert facts.shape == (64, 1024) and facts.dtype == "float32"
    assert list(facts.shards) == [((0, 32), (0, 1024)), ((32, 64), (0, 1024))]
