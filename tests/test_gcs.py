# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in an object store: Google's, as an emulator on this machine plays it."""

import socket

import pytest
from etils import epath
from gcp_storage_emulator.server import create_server
from test_checkpoint import assert_is, newest, save

from lm_scale import lock
from lm_scale.__main__ import main
from lm_scale.checkpoint_folder import CheckpointFolder
from lm_scale.errors import InputError
from lm_scale.lock import RunLock


@pytest.fixture(scope="module")
def bucket():
    """The address of a bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
        # Of a kind of bucket that the emulator knows nothing of.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield "gs://bucket"
    server.stop()


@pytest.mark.slow  # the emulator answers one request after the other
def test_saved_restored_verified_and_let_go(bucket, capsys):
    folder = CheckpointFolder(f"{bucket}/run/checkpoints")
    assert folder.steps() == []
    save(folder, 1, 2, 3, keep=2)
    assert folder.steps() == [2, 3]
    assert_is(newest(folder)[0], 3)
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert "step 3: good" in capsys.readouterr().out

    told = []
    (folder / 3 / "manifest.json").write_text("{")
    assert_is(newest(folder, told.append)[0], 2)
    assert "It is now 3.damaged" in told[0] and folder.steps() == [2]


def test_the_lock(bucket, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda s: None)
    folder = epath.Path(f"{bucket}/locked")
    mine = RunLock(folder, pytest.fail)
    mine.take()
    with pytest.raises(InputError, match="Two runs cannot share a folder"):
        RunLock(folder, pytest.fail).take()
    mine.release()
    other = RunLock(folder, pytest.fail)
    other.take()
    other.release()
