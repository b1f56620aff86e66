# SPDX-License-Identifier: Apache-2.0
"""The fake cloud, with the real gcloud: what it asks, says and returns."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_cloud import STOCK_OUT, Done, FakeCloud, gcloud_missing

WHY = gcloud_missing()
with_gcloud = pytest.mark.skipif(bool(WHY), reason=WHY or "gcloud is here")
ZONE = "us-central1-a"
NODE = f"projects/test-project/locations/{ZONE}/nodes/n1"
OPTIONS = ("--version=tpu-ubuntu2204-base", "--labels=lm-scale-run=r1", "--quiet")


@pytest.fixture
def cloud(tmp_path):
    with FakeCloud(tmp_path) as cloud:
        yield cloud
    assert not [e for vm in cloud.vms for e in cloud.processes(vm.name)]


def tpu_vm(cloud: FakeCloud, verb: str, *rest: str, **kwargs) -> Done:
    given = ("compute", "tpus", "tpu-vm", verb, *rest, f"--zone={ZONE}")
    return cloud.gcloud(*given, **kwargs)


def queued(cloud: FakeCloud, verb: str, *rest: str) -> Done:
    given = ("compute", "tpus", "queued-resources", verb, *rest, f"--zone={ZONE}")
    return cloud.gcloud(*given)


def create(cloud: FakeCloud, name: str = "n1", *more: str, **kwargs) -> Done:
    return tpu_vm(
        cloud, "create", name, "--accelerator-type=v3-8", *OPTIONS, *more, **kwargs
    )


def on_all(cloud: FakeCloud, command: str, **kwargs) -> Done:
    given = ("n1", "--worker=all", f"--command={command}", "--quiet")
    return tpu_vm(cloud, "ssh", *given, **kwargs)


def ssh(cloud: FakeCloud, address: str, command: str, *, stdin: str = ""):
    """The stub without gcloud: what gcloud runs."""
    given = [str(cloud.folder / "bin" / "ssh"), "-T", "-oX=y", f"me@{address}", "--"]
    return subprocess.run(
        [*given, *command.split(" ")], capture_output=True, text=True, timeout=60,
        input=stdin,
    )  # fmt: skip


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# With the real gcloud.


@with_gcloud
def test_a_vm_from_creation_to_deletion(cloud):
    made = create(cloud, "n1", "--spot", "--network=default")
    assert (made.returncode, made.stdout) == (0, "")
    assert made.stderr == "Create request issued for: [n1]\nCreated tpu [n1].\n"
    (body,) = cloud.posts("/nodes$")
    assert body["labels"] == {"lm-scale-run": "r1"} and body["schedulingConfig"]["spot"]
    seen = json.loads(tpu_vm(cloud, "describe", "n1", "--format=json").stdout)
    assert (seen["state"], seen["acceleratorType"]) == ("READY", "v3-8")

    for run, found in (("r1", ["n1"]), ("r2", [])):
        # The filter is gcloud's own: the request has none. "-" is every zone.
        given = ("--zone=-", f"--filter=labels.lm-scale-run={run}", "--format=json")
        listed = cloud.gcloud("compute", "tpus", "tpu-vm", "list", *given)
        names = [node["name"] for node in json.loads(listed.stdout)]
        assert [name.split("/")[-1] for name in names] == found
    assert cloud.requests[-1].path == "/v2/projects/test-project/locations/-/nodes"
    assert cloud.requests[-1].query == {"alt": "json"}

    gone = tpu_vm(cloud, "delete", "n1", "--quiet")
    assert (gone.returncode, cloud.nodes()) == (0, [])
    again = tpu_vm(cloud, "delete", "n1", "--quiet")
    assert again.returncode == 1
    assert f"NOT_FOUND: Resource '{NODE}' was not found" in again.stderr


@with_gcloud
def test_commands_on_all_workers(cloud):
    cloud.make("n1", "v2-32")
    cloud.worker_env = lambda i: {"LM_SCALE_PROCESS_ID": str(i)}
    done = on_all(cloud, 'echo "I  am $LM_SCALE_PROCESS_ID in $(basename "$HOME")"')
    lines = [f"I  am {i} in worker-{i}" for i in range(4)]
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, lines)
    assert "SSH: Attempting to connect to worker 3..." in done.stderr
    keys = [r.body for r in cloud.requests if r.method == "PATCH"]
    assert "ssh-ed25519" in keys[0]["metadata"]["ssh-keys"]  # on the first ssh only

    # The first status in the order of the workers, and the others run to their end.
    done = on_all(cloud, "touch ran; exit $((LM_SCALE_PROCESS_ID * 3))")
    assert done.returncode == 3 and (cloud.home("n1", 3) / "ran").exists()
    failed = (
        "##### Command execution on worker 2 failed with exit status 6. Continuing."
    )
    assert failed in done.stderr

    # One stdin for all: the first that reads gets it.
    assert on_all(cloud, "cat", stdin="secret\n").stdout == "secret\n"
    one = ("n1", "--worker=2", "--command=cat > s; exit 5", "--quiet")
    assert tpu_vm(cloud, "ssh", *one, stdin="secret\n").returncode == 5
    assert (cloud.home("n1", 2) / "s").read_text() == "secret\n"


@with_gcloud
def test_gcloud_loses_the_status_of_some_workers(cloud):
    """A defect of SDK 528: with some of several workers, failures may give 0."""
    cloud.make("n1", "v2-32")
    done = tpu_vm(cloud, "ssh", "n1", "--worker=2,3", "--command=exit 3", "--quiet")
    assert (done.returncode, "IndexError" in done.stderr) == (0, True)


@with_gcloud
def test_gcloud_writes_commands_to_its_log_but_not_stdin(cloud):
    cloud.make("n1")
    on_all(cloud, "cat > s; echo canary-command", stdin="canary-stdin")
    assert (cloud.home("n1") / "s").read_text() == "canary-stdin"
    logs = [f.read_text() for f in (cloud.folder / "gcloud" / "logs").rglob("*.log")]
    assert any("canary-command" in log for log in logs)
    assert not any("canary-stdin" in log for log in logs)


@with_gcloud
def test_copies(cloud, tmp_path):
    cloud.make("n1", "v2-32")
    (secret := tmp_path / "secret").write_text("x")
    secret.chmod(0o600)
    done = tpu_vm(cloud, "scp", str(secret), "n1:.s", "--worker=all", "--quiet")
    assert done.returncode == 0, done.stderr
    for i in range(4):
        assert (cloud.home("n1", i) / ".s").stat().st_mode & 0o777 == 0o600
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "run").write_text("#!")
    (tmp_path / "tree" / "deep" / "run").chmod(0o755)
    there = ("scp", "--recurse", str(tmp_path / "tree"), "n1:~/new", "--quiet")
    assert tpu_vm(cloud, *there).returncode == 0
    back = ("scp", "--recurse", "n1:new", str(tmp_path / "back"), "--quiet")
    assert tpu_vm(cloud, *back).returncode == 0
    assert (tmp_path / "back" / "deep" / "run").stat().st_mode & 0o777 == 0o755
    cloud.full_disk("n1", 0)
    done = tpu_vm(cloud, "scp", str(secret), "n1:t", "--quiet")
    assert done.returncode == 1 and done.stderr.count("No space left on device") == 10


@with_gcloud
def test_unreachable_and_preempted(cloud):
    cloud.make("n1", "v2-32")
    cloud.kill_worker("n1", 1)
    done = on_all(cloud, "echo $HOME")
    assert done.returncode == 255 and len(done.stdout.splitlines()) == 3
    timed_out = "ssh: connect to host 34.100.0.2 port 22: Connection timed out"
    assert done.stderr.count(timed_out) == 10
    cloud.preempt("n1")
    done = on_all(cloud, "true")
    assert (done.returncode, done.stderr) == (
        1, "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) This TPU has terminal state "
        '"PREEMPTED", so it cannot be used anymore.\n',
    )  # fmt: skip
    held = create(cloud)
    assert held.returncode == 1 and "ALREADY_EXISTS" in held.stderr
    assert tpu_vm(cloud, "delete", "n1", "--quiet").returncode == 0
    assert create(cloud).returncode == 0 and cloud.vm("n1").incarnation == 2


@with_gcloud
def test_a_vm_that_goes_while_ssh_waits(cloud):
    cloud.make("n1")
    # What reads the API says READY for some time: ssh itself finds out.
    command = [*"gcloud compute tpus tpu-vm ssh n1 --quiet".split(), f"--zone={ZONE}"]
    command += ["--command=echo up; sleep 1000"]
    with subprocess.Popen(
        command, env=cloud.env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        cloud.preempt("n1", state="READY")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 255
    assert "Connection to 34.100.0.1 closed by remote host." in errors
    assert errors.count("Connection timed out") == 9
    assert cloud.processes("n1") == []


QUEUE = ("q1", "--node-id=n1", "--accelerator-type=v3-8", "--spot", "--quiet",
         "--runtime-version=tpu-ubuntu2204-base", "--labels=lm-scale-run=r1",
         "--valid-until-duration=6h")  # fmt: skip


@with_gcloud
def test_a_queued_resource(cloud):
    made = queued(cloud, "create", *QUEUE)
    assert made.returncode == 0, made.stderr
    assert "Created queued_resource [q1]." in made.stderr
    (body,) = cloud.posts("/queuedResources$")
    assert body["queueingPolicy"] == {"validUntilDuration": "21600s"}
    assert body["spot"] == {} and body["tpu"]["nodeSpec"][0]["nodeId"] == "n1"
    cloud.set_queue("q1", "WAITING_FOR_RESOURCES")
    look = ("describe", "q1", "--format=value(state.state)")
    assert queued(cloud, *look).stdout == "WAITING_FOR_RESOURCES\n"
    assert cloud.nodes() == []
    cloud.set_queue("q1", "ACTIVE")
    assert queued(cloud, *look).stdout == "ACTIVE\n" and cloud.state("n1") == "READY"
    # The labels are the node's, and inside the queued resource.
    assert cloud._nodes[ZONE, "n1"]["labels"] == {"lm-scale-run": "r1"}
    where = "--filter=tpu.nodeSpec[0].node.labels.lm-scale-run=r1"
    assert queued(cloud, "list", where, "--format=value(name)").stdout == "q1\n"
    cloud.preempt("n1")
    assert queued(cloud, *look).stdout == "SUSPENDED\n"
    cloud.set_queue("q1", "ACTIVE")
    done = queued(cloud, "delete", "q1", "--quiet")
    assert done.returncode == 1 and "FAILED_PRECONDITION" in done.stderr
    assert queued(cloud, "delete", "q1", "--force", "--quiet").returncode == 0
    assert (cloud.nodes(), cloud.queues()) == ([], [])


def test_a_queue_takes_its_time(cloud):
    cloud.queue_path = ["ACCEPTED", "PROVISIONING", "ACTIVE"]
    node = {"acceleratorType": "v3-8", "runtimeVersion": "tpu-ubuntu2204-base"}
    body = {"tpu": {"nodeSpec": [{"nodeId": "n1", "node": node}]}}
    key = (ZONE, "q1")
    cloud._create_queue(key, body)
    seen = [cloud._show_queue(key)["state"]["state"] for _ in range(4)]
    assert seen == ["ACCEPTED", "PROVISIONING", "ACTIVE", "ACTIVE"]
    assert cloud.nodes() == ["n1"]
    cloud.fail_queue("q1")
    failed = cloud._show_queue(key)["state"]["failedData"]["error"]
    assert failed["message"] == STOCK_OUT.format(zone=ZONE)


CREATE = "ERROR: (gcloud.compute.tpus.tpu-vm.create) "
UNAUTHENTICATED = (  # only because the test disables the credentials
    " This command is unauthenticated because the [auth/disable_credentials] property "
    "is True"
)
SERVICE_DISABLED = {"error": {
    "code": 403, "status": "PERMISSION_DENIED",
    "message": "Cloud TPU API has not been used in project 1234567890 before or it is "
    "disabled. Enable it by visiting https://console.developers.google.com/apis/api/"
    "tpu.googleapis.com/overview?project=1234567890 then retry.",
    "details": [{
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": "SERVICE_DISABLED", "domain": "googleapis.com",
        "metadata": {"service": "tpu.googleapis.com"},
    }],
}}  # fmt: skip
SAYS = {  # what makes it fail, and all that gcloud then says
    "quota": CREATE + "RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV3sPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone "
    f"{ZONE}.\n",
    "denied": CREATE + "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on "
    f"resource '//tpu.googleapis.com/projects/test-project/locations/{ZONE}' (or it "
    f"may not exist).{UNAUTHENTICATED}.\n",
    "exists": CREATE + f"ALREADY_EXISTS: Resource '{NODE}' already exists\n",
    "stock-out": "Create request issued for: [n1]\n" + CREATE + "{\n"
    '  "code": 8,\n  "message": "There is no more capacity in the zone '
    f'\\"{ZONE}\\"; you can try in another zone where Cloud TPU Nodes are offered (see '
    'https://cloud.google.com/tpu/docs/regions) [EID: 0x1234567890abcdef]"\n}\n',
}


def cause(cloud: FakeCloud, what: str) -> None:
    if what == "quota":
        cloud.quota()
    elif what == "denied":
        cloud.fail("POST", "/nodes$", 403)
    elif what == "exists":
        cloud.make("n1")
    else:
        cloud.stock_out()


@with_gcloud
@pytest.mark.parametrize("what", SAYS)
def test_what_gcloud_says_of_a_failed_create(cloud, what):
    cause(cloud, what)
    done = create(cloud)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", SAYS[what])
    assert cloud.nodes() == (["n1"] if what == "exists" else [])
    assert len(cloud.posts("/nodes$")) == 1


@with_gcloud
def test_a_disabled_api_and_a_wrong_type(cloud):
    cloud.fail("POST", "/nodes$", 403, body=SERVICE_DISABLED)
    done = create(cloud)
    assert done.returncode == 1
    assert (
        "PERMISSION_DENIED: Cloud TPU API has not been used in project" in done.stderr
    )
    done = tpu_vm(cloud, "create", "n1", "--accelerator-type=v9-8", *OPTIONS)
    wrong = CREATE + "INVALID_ARGUMENT: Invalid accelerator type 'v9-8'\n"
    assert (done.returncode, done.stderr) == (1, wrong)


@with_gcloud
def test_an_unavailable_service_is_asked_five_times(cloud):
    cloud.fail("POST", "/nodes$", 503, times=99)
    done = create(cloud)
    assert (done.returncode, len(cloud.posts("/nodes$"))) == (1, 5)
    assert done.stderr.startswith(CREATE + "HttpError accessing <http://127.0.0.1:")
    assert '"status": "UNAVAILABLE"' in done.stderr and "'status': 503" in done.stderr
    cloud._failures.clear()
    cloud.fail("POST", "/nodes$", 503, times=2)
    assert create(cloud).returncode == 0


@with_gcloud
def test_operations_that_take_time_or_for_ever(cloud):
    cloud.operation_polls = 3
    assert create(cloud).returncode == 0
    asked = [r.path for r in cloud.requests if "/operations/" in r.path]
    assert len(asked) >= 3
    cloud.operation_polls = 0
    cloud.hang()
    with pytest.raises(subprocess.TimeoutExpired):
        create(cloud, "n2", timeout=6)
    assert cloud.state("n2") == "CREATING"
    cloud.hang()
    assert create(cloud, "n3", "--async").returncode == 0
    assert tpu_vm(cloud, "delete", "n2", "--quiet").returncode == 0


@with_gcloud
def test_a_vm_deletes_itself(tmp_path):
    with FakeCloud(tmp_path) as cloud:
        cloud.vm_gcloud = True
        vm = cloud.make("n1")
        command = f"gcloud compute tpus tpu-vm delete n1 --zone={ZONE} --quiet"
        assert ssh(cloud, vm.addresses[0], command).returncode == 255
        assert cloud.nodes() == [] and not vm.alive


@with_gcloud
def test_a_gcloud_that_is_killed_asks_no_more(cloud):
    cloud.hang()
    command = ["gcloud", "compute", "tpus", "tpu-vm", "create", "n1", f"--zone={ZONE}"]
    command += ["--accelerator-type=v3-8", *OPTIONS]
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, -15)):
        process = subprocess.Popen(command, env=cloud.env(), stderr=subprocess.DEVNULL)
        before = len(cloud.requests)
        until(lambda n=before: len(cloud.requests) > n + 1)
        process.send_signal(number)
        assert process.wait() == status
        asked = len(cloud.requests)
        time.sleep(0.5)
        assert len(cloud.requests) <= asked + 1
        cloud._nodes.clear()
        cloud.hang()


@with_gcloud
def test_gcloud_that_starts_anew_is_the_same(tmp_path):
    said = []
    for warm in (True, False):
        with FakeCloud(tmp_path / str(warm), warm=warm) as cloud:
            cloud.make("n2")
            cloud.unreachable("n2", 0)
            made = create(cloud)
            gone = tpu_vm(cloud, "ssh", "n2", "--command=true", "--quiet")
            done = [
                (d.returncode, d.stdout, re.sub(r"\.+done", "done", d.stderr))
                for d in (made, gone)  # each dot is a moment waited
            ]
            seen = [(r.method, r.path, r.query) for r in cloud.requests]
            said.append((str(done).replace(str(cloud.folder), ""), seen))
    assert said[0] == said[1]


@with_gcloud
@pytest.mark.slow
@pytest.mark.exhaustive
def test_gcloud_as_slow_as_it_is(tmp_path):
    """Ten times ssh, 5 s apart; five requests in half a minute."""
    with FakeCloud(tmp_path, hurry=1) as cloud:
        cloud.make("n1")
        cloud.unreachable("n1", 0)
        assert 45 < on_all(cloud, "true").seconds < 90
        cloud.fail("POST", "/nodes$", 503, times=99)
        assert 10 < create(cloud, "n2").seconds < 90


# Without gcloud.


def test_processes_outlive_ssh_but_not_their_vm(cloud):
    vm = cloud.make("n1", "v2-32")
    first, second = vm.addresses[:2]
    start = "setsid sleep 1000 >out 2>&1 </dev/null & echo $!"
    pids = [int(ssh(cloud, a, start).stdout) for a in (first, second)]
    assert sorted(cloud.processes("n1")) == sorted(pids)
    cloud.kill_worker("n1", 0)
    assert cloud.processes("n1") == pids[1:]
    assert ssh(cloud, first, "true").returncode == 255
    trap = "trap 'echo heard > told; exit' TERM; echo up; while :; do sleep 0.02; done"
    background = f"bash -c {json.dumps(trap)} > out 2>&1 < /dev/null & sleep 0"
    ssh(cloud, second, background)
    until(lambda: (vm.home(1) / "out").read_text() == "up\n")
    cloud.preempt("n1", grace=20)
    assert (vm.home(1) / "told").read_text() == "heard\n"
    assert cloud.processes("n1") == [] and cloud.state("n1") == "PREEMPTED"
    done = ssh(cloud, second, "true")
    assert done.returncode == 255 and "Connection timed out" in done.stderr


def test_a_killed_ssh_leaves_its_command(cloud):
    vm = cloud.make("n1")
    given = [str(cloud.folder / "bin" / "ssh"), f"me@{vm.addresses[0]}", "--"]
    process = subprocess.Popen([*given, "touch on; sleep 1000"])
    until((vm.home(0) / "on").exists)
    process.kill()
    process.wait()
    assert len(cloud.processes("n1")) >= 1


def test_ssh_s_statuses_and_streams(cloud):
    (address,) = cloud.make("n1").addresses
    done = ssh(cloud, address, "cat; echo oh >&2; exit 9", stdin="a b")
    assert (done.returncode, done.stdout, done.stderr) == (9, "a b", "oh\n")
    assert ssh(cloud, address, "kill -9 $$").returncode == 255  # as ssh says it
    big = "x" * 300_000 + "\n"
    assert ssh(cloud, address, "cat", stdin=big).stdout == big
    # As with sshd, what holds the output open holds ssh.
    done = ssh(cloud, address, "sleep 0.3 & echo now")
    assert done.stdout == "now\n"


def test_a_worker_s_environment(cloud, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    (address,) = cloud.make("n1", metadata={"mine": "m"}).addresses
    env = dict(
        line.partition("=")[::2]
        for line in ssh(cloud, address, "env").stdout.splitlines()
    )
    assert env["HOME"] == str(cloud.home("n1")) and "WANDB_API_KEY" not in env
    base = '"http://$GCE_METADATA_HOST/computeMetadata/v1/instance'
    ask = "curl -s -H Metadata-Flavor:Google " + base
    assert ssh(cloud, address, f'{ask}/preempted"').stdout == "FALSE"
    cloud.notice("n1")
    assert ssh(cloud, address, f'{ask}/preempted"').stdout == "TRUE"
    assert ssh(cloud, address, f'{ask}/attributes/agent-worker-number"').stdout == "0"
    assert ssh(cloud, address, f'{ask}/attributes/mine"').stdout == "m"
    token = ssh(cloud, address, f'{ask}/service-accounts/default/token"').stdout
    assert json.loads(token)["access_token"] == "fake"
    assert "Missing" in ssh(cloud, address, f'curl -s {base}/preempted"').stdout


def test_programs_that_would_harm_this_machine(cloud):
    vm = cloud.make("n1")
    assert ssh(cloud, vm.addresses[0], "sudo -n systemctl stop x").returncode == 1
    assert ssh(cloud, vm.addresses[0], "sudo shutdown -c").returncode == 0
    ssh(cloud, vm.addresses[0], "sudo shutdown -h now")
    until(lambda: not vm.alive)
    assert cloud.state("n1") == "STOPPED"


def test_a_startup_script_and_programs(cloud):
    cloud.programs["df"] = "#!/bin/sh\necho lots\n"
    vm = cloud.make("n1", metadata={"startup-script": "#!/bin/sh\ndf > here\n"})
    until(
        lambda: (file := vm.home(0) / "here").exists() and file.read_text() == "lots\n"
    )
    cloud.full_disk("n1")
    assert "100%" in ssh(cloud, vm.addresses[0], "df -Pk .").stdout


def test_copies_stay_in_the_sandbox(cloud, tmp_path):
    (address,) = cloud.make("n1").addresses
    (file := tmp_path / "f").write_text("x")
    scp = [str(cloud.folder / "bin" / "scp"), "-i", "k", str(file)]
    for target in ("/tmp/elsewhere", "../../elsewhere", "no/such/"):
        done = subprocess.run([*scp, f"me@{address}:{target}"], capture_output=True)
        assert done.returncode == 1
    assert not Path("/tmp/elsewhere").exists()
