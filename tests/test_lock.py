# SPDX-License-Identifier: Apache-2.0
"""The lock of a run: refuses a living owner, takes over from a dead one."""

import json
import subprocess
import sys
import threading

import pytest
from etils import epath

from lm_scale import lock
from lm_scale.errors import InputError
from lm_scale.lock import RunLock, is_dead, whoami

HOLD = """
import sys
from etils import epath
from lm_scale.lock import RunLock
RunLock(epath.Path(sys.argv[1]), print).take()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return epath.Path(tmp_path / "run")


def never(text: str) -> None:
    pytest.fail(text)


@pytest.fixture
def held(folder):
    """A process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_one_is_refused_by_name(folder, held):
    with pytest.raises(InputError, match=f"in use by process {held.pid} on .* since 2"):
        RunLock(folder, never).take()


def test_a_killed_owners_lock_is_taken_over_at_once(folder, held, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 1000.0)
    held.kill()
    held.wait()
    mine = RunLock(folder, never)
    mine.take()
    mine.release()
    assert list(folder.iterdir()) == []


def test_taken_and_released_again_and_again(folder):
    for _ in range(3):
        mine = RunLock(folder, never)
        mine.take()
        with pytest.raises(InputError, match="Two runs cannot share a folder"):
            RunLock(folder, never).take()
        mine.release()


def elsewhere(folder, beats: int) -> None:
    owner = {"host": "another", "pid": 7, "since": "then", "id": "x", "beats": beats}
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps(owner))


def test_an_owner_elsewhere_is_watched(folder, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    elsewhere(folder, beats=1)
    mine = RunLock(folder, never)
    mine.take()  # nothing moved: he is dead
    mine.release()

    monkeypatch.setattr(lock, "PATIENCE", 60.0)
    elsewhere(folder, beats=1)
    sleeping = lock.time.sleep
    monkeypatch.setattr(lock.time, "sleep", lambda s: elsewhere(folder, beats=2))
    with pytest.raises(InputError, match="in use by process 7 on another, since then"):
        RunLock(folder, never).take()
    monkeypatch.setattr(lock.time, "sleep", sleeping)


def test_who_loses_the_lock_is_told(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    told, text = threading.Event(), []
    mine = RunLock(folder, lambda line: (text.append(line), told.set()))
    mine.take()
    elsewhere(folder, beats=1)
    assert told.wait(10)
    assert "taken over by process 7 on another" in text[0]
    mine.release()
    assert (folder / lock.NAME).exists()  # which is the other's now


def test_a_torn_lock_is_nobodys(folder):
    folder.mkdir()
    (folder / lock.NAME).write_text('{"host": "ab')
    mine = RunLock(folder, never)
    mine.take()
    mine.release()


def test_no_permission_is_said(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="Cannot write to"):
        RunLock(epath.Path(tmp_path / "run"), never).take()


def test_a_number_that_was_given_to_another_process_is_dead():
    assert not is_dead(whoami())
    assert is_dead({**whoami(), "start": "1"})
    assert not is_dead({**whoami(), "start": "1", "host": "another"})
