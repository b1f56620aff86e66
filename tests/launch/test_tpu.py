# SPDX-License-Identifier: Apache-2.0
"""launch/tpu.py by the real gcloud, in a cloud on loopback whose VMs are folders here.

"Remote" commands really run: the code is sent, set up, trained, killed and resumed.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_cloud import TYPES, FakeCloud, gcloud_missing
from tiny import WORDS

from launch.slices import GENERATIONS, find

ROOT = Path(__file__).resolve().parents[2]
CANARY = {"WANDB_API_KEY": "canary-of-wandb", "HF_TOKEN": "canary-of-the-hub"}
TINY = [
    "--steps", "24", "--save-every", "6", "--log-every", "2", "--eval-every", "None",
    "--no-eval-at-end", "--sample-prompt", "None", "--batch", "8", "--seq-len", "16",
    "--model.layers", "1", "--model.embed", "32", "--model.mlp", "64",
    "--model.vocab", "512", "--data.tokenizer.vocab-size", "512",
    "--data.corpus.source", "text.txt",
]  # fmt: skip
CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "NPROC": "16"}
CACHE = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "XLA_FLAGS")
CPU |= {name: value for name, value in os.environ.items() if name.startswith(CACHE)}

pytestmark = pytest.mark.skipif(bool(gcloud_missing()), reason=gcloud_missing())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A commit with what a launch needs, and changes that are in none."""
    root = tmp_path_factory.mktemp("launch") / "checkout"
    for name in ("lm_scale", "launch", "configs"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "setup.py", root)
    lines = ((WORDS[i % 13], WORDS[i * i % 11], WORDS[i % 7]) for i in range(2000))
    (root / "text.txt").write_text("".join(" ".join(line) + "\n" for line in lines))
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(["git", *who, *command], cwd=root, check=True)
    (root / "configs/small.py").write_text((root / "configs/quickstart.py").read_text())
    return root


@pytest.fixture
def cloud(tmp_path):
    """VMs whose Python is this one, and whose devices are 8 simulated ones."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *launch/health.py*)\n'
        f"  exec {sys.executable} launch/health.py --expect-kind cpu "
        "--expect-devices $JAX_NUM_CPU_DEVICES --min-disk-gib 0.1;;\n"
        '*"lm_scale train"*) if [ -n "${CRASH:-}" ]; then\n'
        f"""  exec {sys.executable} -c 'raise RuntimeError("boom")'; fi;;\n"""
        f'esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    with FakeCloud(tmp_path / "cloud") as made:
        made.worker_env = lambda i: {
            "LM_SCALE_PYTHON": str(python), "LM_SCALE_WORKER": str(i),
            "LM_SCALE_MACHINE": "sandbox", **CPU,
        }  # fmt: skip
        yield made


def hear() -> None:
    """What a shell's background job, or nohup, has the tests ignore, and so this."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_DFL)


class Launcher:
    """launch/tpu.py, run in a folder of its own."""

    def __init__(self, cloud, checkout, folder):
        self.cloud, self.checkout, self.folder = cloud, checkout, folder
        folder.mkdir(exist_ok=True)
        self.records = folder / "launches"
        self.shown = ""

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(self.checkout / "launch/tpu.py"), *arguments],
            cwd=self.folder, text=True, start_new_session=True,
            preexec_fn=hear,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**self.cloud.env(), "LM_SCALE_LAUNCHES": str(self.records),
                 "PYTHONUNBUFFERED": "1", **CANARY, **env},
        )  # fmt: skip

    def __call__(self, *arguments: str, status: int = 0, **env: str) -> str:
        process = self.start(*arguments, **env)
        self.shown, _ = process.communicate(timeout=240)
        assert process.returncode == status, self.shown
        assert "Traceback (most recent call last)" not in self.shown, self.shown
        return self.shown

    def state(self, name: str) -> dict:
        return json.loads((self.records / name / "state.json").read_text())


@pytest.fixture
def launcher(cloud, checkout, tmp_path):
    return Launcher(cloud, checkout, tmp_path / "here")


def train(checkout, tmp_path, *more: str, slice_: str = "v3-8") -> list[str]:
    return [
        "train", str(checkout / "configs/small.py"), "--slice", slice_,
        "--zone", "europe-west4-a", "--bucket", str(tmp_path / "bucket"),
        "--poll", "0.2", *more,
    ]  # fmt: skip


def wait_for(condition, seconds: float = 120):
    """Until it holds: what it gives then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{condition} does not come about")


def saved(bucket: Path, step: int, name: str = "small") -> dict:
    """What the checkpoint of a step holds: the hashes of all that was in memory."""
    return json.loads((bucket / name / str(step) / "manifest.json").read_text())[
        "arrays"
    ]


def steps(bucket: Path, name: str = "small") -> list[int]:
    found = (bucket / name).glob("*/manifest.json")
    return sorted(int(x.parent.name) for x in found if x.parent.name.isdecimal())


def undisturbed(checkout: Path, folder: Path, arguments: list[str]) -> Path:
    """The same run with no cloud, in a process; the folder of its checkpoints."""
    done = subprocess.run(
        [sys.executable, "-m", "lm_scale", "train", "configs/small.py",
         "--run-dir", str(folder / "run"), "--checkpoint-dir", str(folder / "small"),
         *arguments],
        cwd=checkout, env={**os.environ, **CPU}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def files_with(text: str, *folders: Path) -> list[Path]:
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(OSError):
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(path)
    return found


# --- The whole way --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_nothing_to_its_results(launcher, checkout, cloud, tmp_path):
    shown = launcher(*train(checkout, tmp_path), "--", *TINY)
    (body,) = cloud.posts("/nodes$")
    assert body["acceleratorType"] == "v3-8"
    assert body["labels"]["lm-scale-run"] == "small"
    assert "small: done" in shown and "exists: nothing" in shown
    assert cloud.nodes() == [] and cloud.processes("small") == []
    results = launcher.folder / "runs/small"
    assert (results / "metrics.jsonl").exists()
    assert (results / "config.json").exists()  # what others load
    told = json.loads((results / "launch.json").read_text())
    assert told["commit"] and told["tree"]
    assert "small.py" in (launcher.records / "small/changes.diff").read_text()
    assert "small.py" in (results / "changes.diff").read_text()
    assert launcher.state("small")["status"] == 0
    assert steps(tmp_path / "bucket")[-1] == 24
    for secret in CANARY.values():
        assert secret not in shown + str(cloud.events) + str(cloud.requests)
        assert files_with(secret, tmp_path) == []
    # Twice is once: done is done.
    assert "done already" in launcher("resume", "small")
    assert len(cloud.posts("/nodes$")) == 1


@pytest.mark.slow
def test_preempted_in_the_midst_it_ends_as_if_it_had_not(
    launcher, checkout, cloud, tmp_path
):
    bucket = tmp_path / "bucket"
    longer = [*TINY, "--steps", "200", "--save-every", "20", "--keep", "None"]
    process = launcher.start(*train(checkout, tmp_path, "--spot"), "--", *longer)
    wait_for(lambda: len(steps(bucket)) > 1)
    cloud.preempt("small")  # SIGKILL, with no word
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 0, shown
    assert [vm.incarnation for vm in cloud.vms] == [1, 2]
    assert "the VM is PREEMPTED" in shown
    at = int(re.findall(r"Going on from step (\d+)", shown)[0])
    assert 0 < at < 200
    alone = undisturbed(checkout, tmp_path / "alone", longer)
    assert saved(bucket, 200) == saved(alone, 200)
    assert cloud.nodes() == []


@pytest.mark.slow
def test_two_workers_train_as_one_and_one_that_dies_costs_the_vm(
    launcher, checkout, cloud, tmp_path
):
    """They share no folder but the bucket; each has prepared its own tokens."""
    before = cloud.worker_env
    cloud.worker_env = lambda i: {
        **before(i), "LM_SCALE_COORDINATOR": f"127.0.0.1:{port}",
        "LM_SCALE_PROCESS_ID": str(i), "LM_SCALE_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "4",
    }  # fmt: skip
    port = free_port()
    bucket, longer = tmp_path / "bucket", [*TINY, "--steps", "12", "--save-every", "4"]
    process = launcher.start(*train(checkout, tmp_path, slice_="v4-16"), "--", *longer)
    wait_for(lambda: steps(bucket))
    cloud.kill_worker("small", 1)
    port = free_port()
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert "no answer from worker 1 (1 of 3)" in shown
    assert "worker 1 does not answer" in shown
    assert len(cloud.vms) == 2 and cloud.nodes() == []
    assert steps(bucket)[-1] == 12 and "Going on from step" in shown


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [pytest.param("getting a VM", marks=pytest.mark.exhaustive), "starting", "train"],
)
def test_a_launcher_that_is_killed_is_gone_on_with(
    stage, launcher, checkout, cloud, tmp_path
):
    cloud.operation_polls = 3
    process = launcher.start(*train(checkout, tmp_path), "--", *TINY)
    state = launcher.records / "small/state.json"
    wait_for(lambda: state.exists() and launcher.state("small")["phase"] == stage)
    if stage == "getting a VM":
        wait_for(lambda: cloud.posts("/nodes$"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = launcher(*train(checkout, tmp_path), status=2)
    assert "resume small` goes on with it" in again
    shown = launcher("resume", "small")
    assert "small: done" in shown
    assert len(cloud.posts("/nodes$")) == 1 and cloud.nodes() == []
    assert steps(tmp_path / "bucket")[-1] == 24
    text = (launcher.records / "small/worker-0.log").read_text()
    assert text.count("--- train\n") == 1  # it was started once


@pytest.mark.slow
def test_ctrl_c_leaves_the_training_and_a_second_launcher_is_told(
    launcher, checkout, cloud, tmp_path
):
    process = launcher.start(*train(checkout, tmp_path), "--", *TINY, "--steps", "900")
    wait_for(lambda: steps(tmp_path / "bucket"))
    assert f"by process {process.pid} already" in launcher("resume", "small", status=2)
    os.killpg(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "small goes on without this program" in shown
    assert "exists: VM small, europe-west4-a, v3-8, READY" in shown
    assert "deletes itself in 24.0 h" in shown
    assert "train, running" in launcher("status", "small")
    assert "--- train" in launcher("logs", "small")
    assert "at 8 an hour" in launcher("list", "--price", "8")
    assert "deleting small (VM)" in launcher("down", "small")
    assert cloud.nodes() == [] and cloud.processes("small") == []
    assert "exists: nothing" in launcher("down", "small")  # again is fine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("crash", "arguments", "status", "said"),
    [
        ("", ["--data.corpus.source", "nowhere.txt"], 2, "nowhere.txt"),
        ("1", [], 1, "RuntimeError: boom"),
    ],
)
def test_a_program_that_fails_is_not_tried_again(
    crash, arguments, status, said, launcher, checkout, cloud, tmp_path
):
    before = cloud.worker_env
    cloud.worker_env = lambda i: {**before(i), "CRASH": crash}
    process = launcher.start(*train(checkout, tmp_path), "--", *TINY, *arguments)
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == status, shown
    assert f"worker 0, stage train: ended with {status}" in shown
    _, _, tail = shown.partition("--- the end of worker 0's log:")
    assert said in tail  # with its traceback, if there is one
    assert len(cloud.vms) == 1 and cloud.nodes() == []


@pytest.mark.slow
def test_a_vm_that_stays_runs_a_config_after_the_other(
    launcher, checkout, cloud, tmp_path
):
    launcher(*vm_only())
    bucket = ["--bucket", str(tmp_path / "bucket")]
    config = checkout / "configs/small.py"
    (checkout / "configs/other.py").write_text(config.read_text())
    for path, name in (
        (config, "small"),
        (config.with_name("other.py"), "small-other"),
    ):
        shown = launcher("run", "small", str(path), *bucket, "--", *TINY)
        assert "small: done" in shown and "exists: VM small" in shown
        assert (launcher.folder / "runs" / name / "model.safetensors").exists()
        assert steps(tmp_path / "bucket", name)[-1] == 24
    assert len(cloud.vms) == 1
    assert "there is no such file" in launcher("run", "small", "no.py", status=2)
    launcher("down", "small")


@pytest.mark.slow
def test_checkpoints_that_are_on_the_vm_alone_are_not_deleted(
    launcher, checkout, cloud, tmp_path
):
    arguments = train(checkout, tmp_path)
    at = arguments.index("--bucket")
    del arguments[at : at + 2]
    process = launcher.start(*arguments, "--", *TINY, "--steps", "5000")
    run = "lm_scale/small/runs/small"
    wait_for(lambda: cloud.vms)
    wait_for((cloud.home("small") / run / "checkpoints/12/manifest.json").exists)
    wait_for(lambda: launcher.state("small")["step"] > 0)
    status = cloud.home("small") / "lm_scale/small/status.json"
    os.kill(json.loads(status.read_text())["pid"], signal.SIGKILL)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1, shown
    assert "stays: without --bucket it has the only checkpoints" in shown
    assert cloud.state("small") == "READY"
    shown = launcher("down", "small")
    assert cloud.nodes() == []


@pytest.mark.slow
def test_nothing_takes_a_vm_that_trains_for_its_own(
    launcher, checkout, cloud, tmp_path
):
    process = launcher.start(*train(checkout, tmp_path), "--", *TINY, "--steps", "9999")
    wait_for(lambda: steps(tmp_path / "bucket"))
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)

    # What it may know, and others may not.
    folder = cloud.home("small") / "lm_scale/small"
    pid = json.loads((folder / "status.json").read_text())["pid"]
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    assert {f"{name}={value}" for name, value in CANARY.items()} <= set(environment)
    assert (folder / "secrets.env").stat().st_mode & 0o777 == 0o600

    # Ctrl-C before `resume` has looked at what there is.
    process = launcher.start("resume", "small")
    wait_for(lambda: launcher.state("small")["phase"] == "getting a VM")
    os.kill(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert "small goes on without this program" in shown
    assert cloud.state("small") == "READY" and cloud.processes("small")

    # Somebody else, in the same project, with the same name.
    other = {"LM_SCALE_LAUNCHES": str(tmp_path / "another home")}
    shown = launcher(*train(checkout, tmp_path), "--", *TINY, status=2, **other)
    assert "is of a launch from elsewhere" in shown
    assert cloud.state("small") == "READY" and cloud.processes("small")

    # Another limit: the timer on the VM is set anew, the job is not started again.
    settings = cloud.home("small") / ".lm_scale/deadline/settings"
    before = settings.read_text()
    process = launcher.start("resume", "small", "--max-hours", "30")
    wait_for(lambda: settings.read_text() != before)
    wait_for(lambda: launcher.state("small")["phase"] == "train")

    # `down` while a launcher is at work, which does not make the VM again.
    launcher("down", "--all")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "was taken down" in shown, shown
    assert cloud.nodes() == [] and len(cloud.posts("/nodes$")) == 1


# --- What Google answers --------------------------------------------------------------


def vm_only(*more: str, slice_: str = "v3-8") -> list[str]:
    return ["up", "--name", "small", "--slice", slice_, "--zone", "europe-west4-a",
            "--poll", "0.05", *more]  # fmt: skip


@pytest.mark.parametrize("queued", [False, True])
def test_up_checks_all_workers_and_down_deletes(queued, launcher, cloud):
    more = ["--queued"] if queued else []
    shown = launcher(*vm_only(*more, slice_="v4-16"))
    assert "small: done" in shown
    assert "exists: VM small, europe-west4-a, v4-16, READY" in shown
    assert ("exists: queue small" in shown) == queued
    for i in (0, 1):
        status = json.loads(
            (cloud.home("small", i) / "lm_scale/small/status.json").read_text()
        )
        assert (status["stage"], status["status"]) == ("health", 0)
    launcher("down", "--all")
    assert cloud.nodes() == [] and cloud.queues() == []


def test_no_capacity_is_waited_for_and_told(launcher, cloud):
    cloud.stock_out(times=2)
    shown = launcher(*vm_only())
    assert "There is no more capacity in the zone" in shown
    assert "attempt 2 of 10 in a row" in shown
    assert "small: done" in shown and len(cloud.posts("/nodes$")) == 3


@pytest.mark.parametrize(
    ("fault", "said", "tries", "status"),
    [
        (lambda cloud: cloud.stock_out(times=9), "no more capacity", 2, 1),
        (lambda cloud: cloud.quota(times=9), "the project's quota is used up", 2, 1),
        (lambda cloud: cloud.fail("POST", "/nodes$", 403, times=9),
         "the account lacks a permission", 1, 1),
        (lambda cloud: cloud.fail("POST", "/nodes$", 400, times=9), "(invalid", 1, 2),
    ],
)  # fmt: skip
def test_what_google_refuses_is_told_and_nothing_remains(
    fault, said, tries, status, launcher, cloud
):
    fault(cloud)
    shown = launcher(*vm_only("--attempts", "2"), status=status)
    assert said in shown
    assert "exists: nothing" in shown
    assert len(cloud.posts("/nodes$")) == tries
    assert cloud.nodes() == [] and cloud.queues() == []


def test_a_service_that_is_down_for_a_while(launcher, cloud):
    cloud.fail("GET", "/nodes/small", 503, times=40)  # gcloud itself tries many times
    shown = launcher(*vm_only())
    assert "small: done" in shown


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_a_dead_vm_that_holds_the_name_is_deleted_first(state, launcher, cloud):
    launcher(*vm_only())
    cloud.preempt("small", state=state)
    shown = launcher("resume", "small")
    assert "done already" in shown
    shown = launcher(*vm_only())  # the launch has ended: another of the name
    assert f"small is {state}: deleting it" in shown
    assert [vm.incarnation for vm in cloud.vms] == [1, 2]
    launcher("down", "small")


@pytest.mark.parametrize(
    ("labels", "accelerator", "said"),
    [("a=b", "v3-8", "no launch of ours has made it"),
     ("lm-scale-run=small,lm-scale-owner=0123abcd", "v3-8", "a launch from elsewhere"),
     ("lm-scale-run=small", "v2-8", "exists as v2-8, not v3-8")],
)  # fmt: skip
def test_a_name_that_is_anothers_is_left_alone(
    labels, accelerator, said, launcher, cloud
):
    made = cloud.gcloud(
        "compute", "tpus", "tpu-vm", "create", "small", "--zone=europe-west4-a",
        f"--accelerator-type={accelerator}", "--version=tpu-ubuntu2204-base",
        f"--labels={labels}",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    shown = launcher(*vm_only(), status=2)
    assert said in shown
    assert cloud.state("small") == "READY"


@pytest.mark.parametrize("fault", ["suspend_queue", "fail_queue"])
def test_a_queue_that_fails_is_deleted_and_asked_again(fault, launcher, cloud):
    cloud.queue_path = ["ACCEPTED", "WAITING_FOR_RESOURCES"]
    process = launcher.start(*vm_only("--queued"))
    for line in process.stdout:  # pyright: ignore
        if "small: queued, WAITING_FOR_RESOURCES, after" in line:
            break
    cloud.queue_path = ["PROVISIONING", "ACTIVE"]
    getattr(cloud, fault)("small")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert re.search("the request was queued, (SUSPENDED|FAILED): ", shown)
    assert re.search("small is (SUSPENDED|FAILED): deleting it", shown)
    assert len(cloud.posts("/queuedResources$")) == 2
    launcher("down", "small")
    assert cloud.queues() == []


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_the_queue_the_request_is_cancelled(received, launcher, cloud):
    cloud.queue_path = ["WAITING_FOR_RESOURCES"]
    process = launcher.start(*vm_only("--queued"))
    wait_for(lambda: cloud.queue_state("small") == "WAITING_FOR_RESOURCES")
    os.kill(process.pid, received)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 75, shown
    assert "what was asked for is cancelled" in shown and "exists: nothing" in shown
    assert cloud.queues() == [] and cloud.nodes() == []


def test_interrupted_while_the_vm_is_made_it_is_deleted(launcher, cloud):
    cloud.hang()
    process = launcher.start(*vm_only())
    wait_for(lambda: cloud.posts("/nodes$"))
    os.kill(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 75, shown
    assert cloud.nodes() == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [("dead", "copying the code failed"), ("full", "No space left on device")],
)
def test_a_vm_that_takes_nothing_is_made_again_and_then_given_up(
    kind, said, launcher, cloud
):
    process = launcher.start(*vm_only("--attempts", "2"))

    def spoilt():
        for vm in cloud.vms:
            getattr(vm, kind).add(0)
        return process.poll() is not None

    wait_for(spoilt)
    shown = process.stdout.read()  # pyright: ignore
    assert process.returncode == 1, shown
    assert said in shown and "giving up" in shown
    assert len(cloud.vms) == 2 and cloud.nodes() == []


@pytest.mark.slow
def test_the_vm_deletes_itself_though_the_launcher_is_dead(launcher, cloud):
    cloud.vm_gcloud = True
    process = launcher.start(*vm_only("--max-hours", "0.01"))  # 36 s
    wait_for(
        lambda: cloud.vms and (cloud.home("small") / ".lm_scale/deadline").exists()
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert cloud.state("small") == "READY"
    wait_for(lambda: cloud.nodes() == [])
    assert launcher.state("small")["status"] is None
    assert "--max-hours 0.01 are over" in launcher("resume", "small", status=75)
    assert len(cloud.posts("/nodes$")) == 1  # nor is it made again


# --- What the real parser says --------------------------------------------------------


def commands_of(*arguments: str, **env: str) -> list[list[str]]:
    """The gcloud commands that --dry-run prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/tpu.py"), *arguments, "--dry-run"],
        text=True, capture_output=True, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()
            if line.startswith("gcloud ")]  # fmt: skip


@pytest.mark.slow
def test_every_command_passes_the_real_parser(cloud, tmp_path):
    """Which ends a command that it takes with: there is no account."""
    home = {"LM_SCALE_LAUNCHES": str(tmp_path / "records")}
    every = [
        commands_of(*vm_only(*more, slice_=name), **home)
        for name, more in [
            ("v2-8", []), ("v3-32", ["--spot"]), ("v4-16", ["--queued"]),
            ("v5e-16", ["--queued", "--spot", "--project", "my-project"]),
            ("v5p-64", ["--runtime", "v2-alpha-tpuv5", "--create=--network=other"]),
            ("v6e-8", ["--create=--internal-ips", "--create=--tags=a,b"]),
        ]
    ]  # fmt: skip
    record = tmp_path / "records/small"
    record.mkdir(parents=True)
    (record / "startup.sh").write_text("")  # which a dry run only names
    state = {"name": "small", "slice": "v3-8", "zone": "us-central1-a"}
    (record / "state.json").write_text(json.dumps(state))
    every += [
        commands_of(*verb, **home)
        for verb in (
            ["status", "small"], ["logs", "small", "--worker", "0"],
            ["ssh", "small", "--worker", "0"], ["down", "small"], ["list"],
            ["down", "--all"], ["resume", "small"],
        )
    ]  # fmt: skip
    unique = {}
    for command in (one for some in every for one in some):
        flags = [word.split("=")[0] for word in command if word.startswith("--")]
        unique[tuple(command[:5]), tuple(sorted(flags))] = command
    env = cloud.env()
    del env["CLOUDSDK_AUTH_DISABLE_CREDENTIALS"]
    assert len(unique) > 10
    for command in unique.values():
        done = subprocess.run(command, env=env, text=True, capture_output=True)
        assert done.returncode == 1, (command, done.stderr)
        assert "do not currently have an active account" in done.stderr, command
    assert cloud.requests == []
    wrong = [*next(iter(unique.values())), "--no-such-flag"]
    assert subprocess.run(wrong, env=env, capture_output=True).returncode == 2


def test_all_slices_are_of_types_that_google_lists():
    for generation in GENERATIONS:
        for size in generation.sizes:
            assert find(f"{generation.name}-{size}").name in TYPES


# --- Wrong usage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "configs/typo.py", "--slice", "v3-8", "--zone", "us-central1-a"],
         "configs/typo.py"),
        (vm_only(slice_="tpu7x-8"), "Google Kubernetes Engine"),
        (vm_only(slice_="v3-7"), "there is none of 7"),
        ([*vm_only(), "--zone", "europe"], "expected one such as europe-west4-a"),
        ([*vm_only(), "--name", "Big"], "expected up to 40 small letters"),
        ([*vm_only(), "--max-hours", "0"], "expected more than 0"),
        ([*vm_only(), "--spott"], "unrecognized arguments: --spott"),
        ([*vm_only(), "--", "--steps", "3"], "unknown arguments: --steps 3"),
        (["resume", "typo"], "there is no launch of this name"),
        (["down"], "expected a launch's name, or --all"),
        (["logs", "typo"], "there is no launch of this name"),
    ],
)  # fmt: skip
def test_wrong_usage_is_refused_before_anything_is_asked(
    arguments, said, launcher, cloud
):
    assert said in launcher(*arguments, status=2)
    assert cloud.requests == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--spot"], "--spot without --bucket"),
        (["--bucket", "s3://x"], "expected gs://BUCKET/FOLDER"),
        (["--", "--stepz", "3"], "--steps"),
        (["--", "--run-dir", "x"], "the launch sets it"),
        (["--", "--batch", "0"], "batch"),
    ],
)
def test_a_run_that_cannot_be_costs_no_vm(more, said, launcher, checkout, cloud):
    config = str(checkout / "configs/small.py")
    place = ["--slice", "v3-8", "--zone", "europe-west4-a"]
    assert said in launcher("train", config, *place, *more, status=2)
    assert cloud.requests == []
