# SPDX-License-Identifier: Apache-2.0
"""hub.py: what is uploaded, one at a time, and failures that end nothing."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest

from lm_scale import hub
from lm_scale.hub import HubUploads

TOKEN = "hf_secret0123"
OWN = "hf_own4567"  # of the one that is logged in


class Url(str):
    repo_id = "someone/norwegian"


class Api:
    """Stands in for HfApi: notes the calls, fails or waits as it is told."""

    calls = []
    error = None  # what the next upload raises
    gate = None  # what the next upload waits for
    running = most = 0  # uploads at a time

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, exist_ok):
        self.calls.append(("create", repo_id, exist_ok, self.token))
        return Url("https://hub/someone/norwegian")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        cls = type(self)
        cls.running += 1
        cls.most = max(cls.most, cls.running)
        try:
            if self.gate is not None:
                assert self.gate.wait(20)
            if self.error is not None:
                raise self.error
            self.files = {p.name: p.read_text() for p in Path(folder_path).iterdir()}
            self.calls.append(("upload", repo_id, commit_message, self.files))
        finally:
            cls.running -= 1


@pytest.fixture
def api(monkeypatch):
    class Fresh(Api):
        calls = []

    monkeypatch.setattr(huggingface_hub, "HfApi", Fresh)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: OWN)
    return Fresh


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors", "run.json", "metrics.jsonl"):
        (tmp_path / name).write_text(name)
    return tmp_path


def wait(uploads):
    uploads._thread.join(20)
    assert not uploads.busy


def kinds(api):
    return [call[0] for call in api.calls]


def test_first_upload_creates_the_repository(api, folder):
    lines = []
    uploads = HubUploads(folder, "norwegian", token=TOKEN, console_print=lines.append)
    assert not uploads.busy
    uploads.start("step 10")
    wait(uploads)
    uploads.finish("step 20")
    assert api.calls[0] == ("create", "norwegian", True, TOKEN)
    # The repository is that of the answer, which names its owner.
    assert [c[:3] for c in api.calls[1:]] == [
        ("upload", "someone/norwegian", "step 10"),
        ("upload", "someone/norwegian", "step 20"),
    ]
    assert lines[0] == "Uploads go to https://hub/someone/norwegian"
    assert not any("failed" in line or "Gave up" in line for line in lines)


def test_uploads_what_a_user_of_the_model_wants(api, tmp_path):
    wanted = {
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "merges.txt", "vocab.json", "eval_results.json", "metrics.jsonl", "README.md",
        "events.out.tfevents.17.host.from0", "events.out.tfevents.18.host.from5",
    }  # fmt: skip
    private = {
        "run.json", "wandb_id", "metrics.jsonl.tmp", "checkpoints/10/config.json",
        "data/tokenizer/tokenizer.json", "data/train/tokens", "wandb/config.json",
        "old/model.safetensors", "wandb/events.out.tfevents.3.host",
    }  # fmt: skip
    for name in wanted | private:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    HubUploads(tmp_path, "norwegian", console_print=lambda text: None).finish("all")
    files = api.calls[-1][3]
    assert files == {name: name for name in wanted}


def test_relative_folder(api, folder, monkeypatch):
    monkeypatch.chdir(folder)
    HubUploads(Path("."), "norwegian", console_print=lambda text: None).finish("all")
    assert set(api.calls[-1][3]) == {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
    }


@pytest.mark.parametrize("links", [True, False])
def test_uploads_the_files_as_they_were_at_the_start(api, folder, monkeypatch, links):
    """The run writes on: it replaces its weights and adds to its metrics."""
    if not links:

        def refuse(*paths):
            raise OSError("a file system without links")

        monkeypatch.setattr(os, "link", refuse)
    (folder / "eval_results.json").write_text("old")
    api.gate = threading.Event()
    uploads = HubUploads(folder, "norwegian", console_print=lambda text: None)
    uploads.start("step 10")
    linked = (folder / "model.safetensors").stat().st_nlink == 2
    assert linked == links  # no second copy of the weights on the disk

    (folder / "new").write_text("newer")
    os.replace(folder / "new", folder / "model.safetensors")
    (folder / "eval_results.json").write_text("newer")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(" and more")
    (folder / "config.json").unlink()
    api.gate.set()
    wait(uploads)
    assert api.calls[-1][3] == {
        "config.json": "config.json",
        "model.safetensors": "model.safetensors",
        "metrics.jsonl": "metrics.jsonl",
        "eval_results.json": "old",
    }
    assert not (folder / ".upload").exists()


def test_weights_that_are_a_link_are_uploaded(api, folder):
    os.replace(folder / "model.safetensors", folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    uploads = HubUploads(folder, "norwegian", console_print=lambda text: None)
    uploads.finish("all")
    assert api.calls[-1][3]["model.safetensors"] == "model.safetensors"


def test_what_a_killed_run_staged_is_not_uploaded(api, folder):
    (folder / ".upload").mkdir()
    (folder / ".upload" / "model-00001-of-00002.safetensors").write_text("old")
    HubUploads(folder, "norwegian", console_print=lambda text: None).finish("all")
    assert "model-00001-of-00002.safetensors" not in api.calls[-1][3]
    assert not (folder / ".upload").exists()


def test_failure_to_stage_is_one_line(api, folder):
    lines = []
    (folder / ".upload").write_text("in the way")
    uploads = HubUploads(folder, "norwegian", console_print=lines.append)
    uploads.start("step 10")
    assert not uploads.busy and api.calls == []
    (line,) = lines
    assert line.startswith("Upload to the hub failed (FileExistsError: ")
    (folder / ".upload").unlink()
    uploads.start("step 20")
    wait(uploads)
    assert kinds(api) == ["create", "upload"]


def test_one_upload_at_a_time_and_the_last_one_always(api, folder):
    api.gate = threading.Event()
    uploads = HubUploads(folder, "norwegian", console_print=lambda text: None)
    uploads.start("step 10")
    assert uploads.busy
    uploads.start("step 20")

    end = threading.Thread(target=uploads.finish, args=("step 30",))
    end.start()
    end.join(0.1)
    assert end.is_alive()  # it waits for the upload under way
    api.gate.set()
    end.join(20)
    assert not end.is_alive() and not uploads.busy
    assert api.most == 1
    assert [c[2] for c in api.calls[1:]] == ["step 10", "step 30"]


def test_creates_the_repository_at_the_start_of_the_run(api, tmp_path):
    lines = []
    uploads = HubUploads(tmp_path / "run", "norwegian", console_print=lines.append)
    uploads.create()
    wait(uploads)
    assert lines == ["Uploads go to https://hub/someone/norwegian"]
    (tmp_path / "run").mkdir()
    uploads.start("step 10")
    wait(uploads)
    assert kinds(api) == ["create", "upload"]
    assert len(lines) == 1


def test_missing_token_is_told_at_the_start(api, folder, monkeypatch):
    lines = []
    uploads = HubUploads(folder, "norwegian", token=" ", console_print=lines.append)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        uploads.create()
        wait(uploads)
    assert lines == [
        "Creating the hub repository failed (LookupError: no token: set HF_TOKEN, or "
        "run `hf auth login`): the run goes on; the next save tries again."
    ]
    uploads.start("step 10")
    wait(uploads)
    assert kinds(api) == ["create", "upload"]


class Panic(BaseException):
    """As pyo3's, which Rust code raises."""


@pytest.mark.parametrize(
    "error", [OSError("no\nnetwork"), PermissionError("403"), SystemExit(1), Panic("x")]
)
def test_failure_prints_one_line_and_the_next_upload_tries_again(
    api, folder, capfd, error
):
    lines = []
    uploads = HubUploads(folder, "norwegian", console_print=lines.append)
    api.error = error
    uploads.start("step 10")
    wait(uploads)
    name = type(error).__name__
    (line,) = lines[1:]
    assert line.startswith(f"Upload to the hub failed ({name}: ") and "\n" not in line
    assert line.endswith("): the run goes on; the next save tries again.")

    uploads.finish("step 20")
    assert len([x for x in lines if "failed" in x]) == 2
    assert lines[-1].endswith(f": the run goes on; the files are in {folder}.")
    api.error = None
    uploads.start("step 30")
    wait(uploads)
    assert kinds(api) == ["create", "upload"]
    assert capfd.readouterr() == ("", "")  # no traceback of the thread


def test_repository_that_could_not_be_created_is_tried_again(api, folder, monkeypatch):
    def refuse(self, repo_id, *, exist_ok):
        raise ValueError("no such owner")

    create = api.create_repo
    lines = []
    uploads = HubUploads(folder, "nobody/x", console_print=lines.append)
    monkeypatch.setattr(api, "create_repo", refuse)
    uploads.start("step 10")
    wait(uploads)
    assert "no such owner" in lines[0] and api.calls == []
    monkeypatch.setattr(api, "create_repo", create)
    uploads.start("step 20")
    wait(uploads)
    assert kinds(api) == ["create", "upload"]


@pytest.mark.parametrize("given", [TOKEN, f" {TOKEN}\n", None])
def test_token_is_used_and_never_shown(api, folder, capfd, given):
    used = TOKEN if given else OWN
    uploads = HubUploads(folder, "norwegian", token=given)  # prints
    # Near the end of what is shown of an error, too: cut off, it is still a secret.
    for filler in ("", "x" * 290):
        api.error = ValueError(f"{filler} bad header: Bearer {used}")
        uploads.start("step 10")
        wait(uploads)
    assert api.calls[0][3] == used
    shown = "".join(capfd.readouterr())
    assert shown.count("Upload to the hub failed") == 2
    assert "Bearer <token>" in shown
    assert used[:8] not in shown and used not in repr(uploads)


def test_ctrl_c_gives_up_waiting(api, folder, monkeypatch):
    api.gate = threading.Event()
    lines = []
    uploads = HubUploads(folder, "norwegian", console_print=lines.append)
    uploads.start("step 10")
    thread = uploads._thread

    def ctrl_c(timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(thread, "join", ctrl_c)
        uploads.finish("step 20")
    assert uploads._thread is thread and thread.daemon
    assert lines[-1] == (
        f"Gave up the upload to the hub (Ctrl-C): the files are in {folder}."
    )
    api.gate.set()
    wait(uploads)


def test_interrupted_run_does_not_wait(api, folder):
    api.gate = threading.Event()
    lines = []
    uploads = HubUploads(folder, "norwegian", console_print=lines.append)
    uploads.start("step 10")
    uploads.give_up()
    assert uploads.busy
    missing = "Not uploaded to the hub: step 10; the next command goes on."
    assert lines[-1] == missing
    assert not (folder / ".upload").exists()  # should the process end now
    api.gate.set()
    wait(uploads)  # its failure, without the files, is no news
    assert lines[-1] == missing


def test_interrupted_run_tells_what_is_missing(api, folder):
    def told(*steps):
        lines = []
        uploads = HubUploads(folder, "norwegian", console_print=lines.append)
        for step in steps:
            uploads.start(step)
        api.gate.set()
        if steps:
            wait(uploads)
        uploads.give_up()
        return [line for line in lines if "Not uploaded" in line]

    api.gate = threading.Event()
    assert told() == told("step 10") == []
    api.gate.clear()
    assert "step 20" in told("step 10", "step 20")[0]  # too soon after the other
    api.error = OSError("no network")
    assert "step 30" in told("step 30")[0]


def test_does_not_wait_for_ever(api, folder, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.01)
    api.gate = threading.Event()
    lines = []
    uploads = HubUploads(folder, "norwegian", console_print=lines.append)
    uploads.start("step 10")
    uploads.finish("step 20")
    assert "Gave up the upload to the hub (it took longer" in lines[-1]
    api.gate.set()
    wait(uploads)
    assert "step 20" not in str(api.calls)


def test_the_real_library_takes_the_folder(folder, monkeypatch):
    """Without the network: which files it would send."""
    sent = {}

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        for part in self._prepare_upload_folder_additions(folder_path, ""):
            with part.as_file() as file:
                sent[part.path_in_repo] = file.read().decode()

    real = huggingface_hub.HfApi
    monkeypatch.setattr(real, "create_repo", lambda *_, **__: Url("https://hub/x"))
    monkeypatch.setattr(real, "upload_folder", upload_folder)
    HubUploads(folder, "x", token=TOKEN, console_print=lambda text: None).finish("all")
    names = ("config.json", "model.safetensors", "metrics.jsonl")
    assert sent == {name: name for name in names}


def test_no_network_is_one_line(folder, monkeypatch, capfd):
    """The real library: conftest.py sets HF_HUB_OFFLINE."""
    lines = []
    HubUploads(folder, "norwegian", token=TOKEN, console_print=lines.append).finish("")
    assert len(lines) == 2 and "Upload to the hub failed (" in lines[1]
    assert TOKEN not in "".join([*lines, *capfd.readouterr()])


def test_importing_it_is_light():
    code = "import sys, lm_scale.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
