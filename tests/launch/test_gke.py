# SPDX-License-Identifier: Apache-2.0
"""launch/gke.py: what it renders, by published schemas; its verbs, with a stub kubectl;
the command of a pod, which is run for real."""

import base64
import copy
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from launch import gke, jobset  # noqa: E402
from launch.gke_nodes import LABELS, TPU7X  # noqa: E402
from launch.image import EXTRAS  # noqa: E402
from launch.slices import GENERATIONS  # noqa: E402
from launch.yaml_text import to_yaml  # noqa: E402

CONFIG = str(ROOT / "configs" / "quickstart.py")
NEEDED = ["--name", "r1", "--image", "eu.pkg.dev/p/r/i:t", "--bucket", "gs://b/path"]
SLICES = [
    f"{generation.name}-{size}"
    for generation in (*GENERATIONS, TPU7X)
    if generation.name in LABELS
    for size in generation.sizes
]
OPTIONS = [
    [],
    ["--spot"],
    ["--namespace", "team-a", "--queue", "lq", "--service-account", "trainer"],
    ["--secret", "keys", "--max-hours", "0.5", "--max-restarts", "0"],
    ["--volume", "claim"],
    ["--", "--steps", "10", "--data.corpus.source", "a $(b) 'c' \"d\"\né: {}"],
]
OTHERS = [
    ["--gpu", "nvidia-h100-80gb", "--nodes", "2"],
    ["--gpu", "nvidia-l4", "--gpus-per-node", "1"],
    ["--cpus", "4", "--nodes", "3", "--memory", "8Gi"],
    ["--slice", "v5e-16", "--slices", "4"],
    ["--slice", "v5litepod-16"],
]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in gke.KEYS:
        monkeypatch.delenv(name, raising=False)


def text_of(*options: str, verb: str = "train") -> str:
    """What `render` prints (or `prepare --dry-run`)."""
    line = [verb, CONFIG, *NEEDED, *options]
    parsed = gke.parse(line)
    return to_yaml(gke.rendered(parsed))


def document(*options: str, verb: str = "train") -> dict[str, Any]:
    return yaml.safe_load(text_of(*options, verb=verb))


def job_of(found: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = found["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(found: dict[str, Any]) -> dict[str, Any]:
    (container,) = job_of(found)["template"]["spec"]["containers"]
    return container


# --- By published schemas -------------------------------------------------------------


def closed(schema: Any) -> Any:
    """The schema with other fields forbidden: a cluster would drop them silently."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(part) for name, part in schema.items()}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@functools.cache
def jobset_schema() -> dict[str, Any]:
    file = Path(__file__).with_name("schemas") / "jobset.yaml"
    (version,) = yaml.safe_load(file.read_text())["spec"]["versions"]
    return closed(version["schema"]["openAPIV3Schema"])


def validate(found: dict[str, Any], versions: list[str] | None = None) -> None:
    """By JobSet's schema, and what is in it by those of Kubernetes' Jobs; raises."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    import jsonschema

    jsonschema.Draft202012Validator(jobset_schema()).validate(found)
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": found["metadata"],
        "spec": job_of(found),
    }
    for version in versions or [kubernetes_validate.latest_version()]:
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("name", SLICES)
def test_each_slice(name):
    found = document("--slice", name)
    job, container = job_of(found), container_of(found)
    selector = job["template"]["spec"]["nodeSelector"]
    topology = selector["cloud.google.com/gke-tpu-topology"]
    count = int(container["resources"]["limits"]["google.com/tpu"])
    chips = math.prod(int(side) for side in topology.split("x"))
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["parallelism"] * count == chips
    number = int(name.split("-")[1])
    assert chips == (number if name.startswith(("v5e", "v6e")) else number // 2)
    validate(found)


def test_labels_of_nodes():
    """As GKE's documentation has them."""
    found = {
        name: document("--slice", name)
        for name in ("v3-8", "v3-32", "v4-8", "v5e-8", "v5p-8960", "v6e-256", "tpu7x-8")
    }
    nodes = {
        name: tuple(job_of(one)["template"]["spec"]["nodeSelector"].values())
        for name, one in found.items()
    }
    assert nodes == {
        "v3-8": ("tpu-v3-device", "2x2"),
        "v3-32": ("tpu-v3-slice", "4x4"),
        "v4-8": ("tpu-v4-podslice", "2x2x1"),
        "v5e-8": ("tpu-v5-lite-podslice", "2x4"),
        "v5p-8960": ("tpu-v5p-slice", "8x20x28"),
        "v6e-256": ("tpu-v6e-slice", "16x16"),
        "tpu7x-8": ("tpu7x", "2x2x1"),
    }


@pytest.mark.parametrize("hardware", [["--slice", "v5p-16"], *OTHERS])
def test_all_options(hardware):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    versions = [
        version
        for version in kubernetes_validate.utils.all_versions()
        if tuple(map(int, version.split(".")[:2])) >= (1, 31)  # podFailurePolicy is GA
    ]
    for options in OPTIONS:
        validate(document(*hardware, *options), [versions[0], versions[-1]])
    validate(document(verb="prepare"), versions)


def test_a_wrong_field_is_found():
    """A test of the validators: each of these is refused by one of them."""
    found = document("--slice", "v5e-16", "--spot", "--secret", "keys")
    validate(found)
    wrong = {
        ("spec", "replicatedJob"): [],
        ("spec", "failurePolicy", "maxRestart"): 1,
        ("spec", "failurePolicy", "rules", 0, "action"): "Fail",
        ("spec", "network", "enableDNSHostname"): True,
        ("spec", "ttlSecondsAfterFinished"): "1h",
        (*JOB, "parallelism"): "4",
        (*JOB, "backofLimit"): 0,
        (*JOB, "podFailurePolicy", "rules", 1, "onExitCodes", "value"): [1],
        (*JOB, "template", "spec", "terminationGracePeriod"): 120,
        (*JOB, "template", "spec", "nodeSelector"): ["tpu"],
        (*JOB, "template", "spec", "containers", 0, "resource"): {},
        (*JOB, "template", "spec", "containers", 0, "env", 0, "value"): 1,
        (*JOB, "template", "spec", "volumes", 0, "csi", "attributes"): {},
    }
    for path, value in wrong.items():
        changed = copy.deepcopy(found)
        place = changed
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        with pytest.raises(Exception, match="(?i)valid|properties|type|enum|one of"):
            validate(changed)


JOB = ("spec", "replicatedJobs", 0, "template", "spec")


def test_yaml_says_what_was_rendered():
    for hardware, options in itertools.product([["--slice", "v4-8"], *OTHERS], OPTIONS):
        parsed = gke.parse(["train", CONFIG, *NEEDED, *hardware, *options])
        made = gke.rendered(parsed)
        assert yaml.safe_load(to_yaml(made)) == made
    for odd in (
        "", " a", "a: b", "# a", "yes", "1", "1e3", "null", "a\n\nb", "\x85\x01\x7f",
        "a\tb", "- a", "é\u2028\U0001f600", " a\nb", "a\nb\n", "a \nb", "---", [], {},
        [[1, [2]], {"a": []}], {"a": {"b": None, "c": [{"d": 1, "e": [True, 0.5]}]}},
    ):  # fmt: skip
        assert yaml.safe_load(to_yaml({"x": odd, "y": [odd]})) == {"x": odd, "y": [odd]}


def test_kubectl_reads_it(tmp_path):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(  # a command of kubectl's that asks no cluster
        "kubectl label --local --dry-run=client -o json -f - a=b".split(),
        input=text_of("--slice", "v5e-16"), text=True, capture_output=True, timeout=60,
        env={**os.environ, "KUBECONFIG": "/dev/null", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metadata"]["labels"]["a"] == "b"


# --- What it says ---------------------------------------------------------------------


def test_the_exit_status_decides():
    found = document("--slice", "v5e-16", "--max-restarts", "7")
    policy, job = found["spec"]["failurePolicy"], job_of(found)
    first, second = job["podFailurePolicy"]["rules"]
    assert first["action"] == "Count"
    assert first["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert second["action"] == "FailJob"
    assert second["onExitCodes"]["values"] == [1, 2, 124]  # not 75, not 137
    assert second["onExitCodes"]["containerName"] == container_of(found)["name"]
    assert job["backoffLimit"] == 0  # any other end is the Job's: BackoffLimitExceeded
    reasons = {
        rule["onJobFailureReasons"][0]: rule["action"] for rule in policy["rules"]
    }
    assert reasons == {
        "PodFailurePolicy": "FailJobSet",
        "DeadlineExceeded": "FailJobSet",
    }
    assert policy["maxRestarts"] == 7
    assert policy["restartStrategy"] == "BlockingRecreate"
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


def test_who_is_who():
    env = environment(document("--gpu", "nvidia-h100-80gb", "--nodes", "2"))
    assert env["LM_SCALE_COORDINATOR"] == "r1-w-0-0.r1:8476"
    assert env["LM_SCALE_NUM_PROCESSES"] == "2"
    index = env["LM_SCALE_PROCESS_ID"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert "/usr/local/nvidia/lib64" in env["LD_LIBRARY_PATH"]
    for alone in (["--gpu", "nvidia-l4"], ["--slice", "v5p-16"]):  # GKE tells TPUs
        assert "LM_SCALE_COORDINATOR" not in environment(document(*alone))


def environment(found: dict[str, Any]) -> dict[str, Any]:
    pairs = container_of(found)["env"]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in pairs}


def test_several_slices_each_in_its_node_pool():
    found = document("--slice", "v5e-16", "--slices", "4")
    assert found["spec"]["replicatedJobs"][0]["replicas"] == 4
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert found["metadata"]["annotations"][key] == "cloud.google.com/gke-nodepool"
    assert key not in document("--slice", "v5e-16")["metadata"]["annotations"]


def test_where_a_run_writes():
    args = container_of(document("--cpus", "2"))["args"]
    assert args == [
        "lm-scale", "train", "configs/quickstart.py", "--run-dir", "/bucket/path/r1",
        "--checkpoint-dir", "gs://b/path/r1/checkpoints",
    ]  # fmt: skip
    found = document("--cpus", "2", "--volume", "claim")
    assert "/bucket/r1" in container_of(found)["args"]
    volumes = job_of(found)["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"] == {"claimName": "claim"}
    prepared = document(verb="prepare")
    assert prepared["metadata"]["name"] == "r1-prepare"
    assert container_of(prepared)["args"][-2:] == ["--run-dir", "/bucket/path/r1"]
    assert job_of(prepared)["parallelism"] == 1


def test_kubernetes_replaces_nothing_in_a_command():
    args = container_of(document("--cpus", "2", "--", "--x", "$(LM_SCALE_END)"))["args"]
    assert args[-1] == "$$(LM_SCALE_END)"
    assert "$(" not in container_of(document("--cpus", "2"))["command"][2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--slice v5e-16, --gpu NAME or --cpus N"),
        (["--slice", "v2-8"], "GKE has no TPU v2"),
        (["--slice", "v5e-17"], "there is none of 17"),
        (["--slice", "tpu7x-7"], "of tpu7x there are 8, 16"),
        (["--slice", "v9-8"], "no TPU v9"),
        (["--slice", "v5e-8", "--slices", "2"], "slices of several VMs"),
        (["--slice", "v3-32", "--slices", "2"], "none of v3"),
        (["--gpu", "nvidia-l4", "--slices", "2"], "use --nodes"),
        (["--cpus", "2", "--name", "Run_1"], "'Run_1': expected small letters"),
        (["--cpus", "2", "--name", "a" * 41], "40 at most"),
        (["--cpus", "2", "--bucket", "b/path"], "'b/path': expected gs://"),
        (["--cpus", "2", "--bucket", "gs://b/../c"], "expected gs://"),
        (["--cpus", "2", "--image", "a b"], "expected REPOSITORY:TAG"),
        (["--cpus", "2", "--secret", "A"], "--secret 'A': this is no name"),
        (["--cpus", "2", "--service-account", "a_b"], "--service-account 'a_b'"),
        (["--cpus", "0"], "--cpus 0: expected a number above 0"),
        (["--cpus", "2", "--max-hours", "-1"], "--max-hours -1: expected"),
        (["--cpus", "2", "--max-hours", "nan"], "--max-hours nan: expected"),
        (["--cpus", "2", "--max-restarts", "-1"], "expected 0 or more"),
        (["--cpus", "2", "--memory", "lots"], "'lots': expected such as 32Gi"),
        (["--cpus", "2", "--", "--run-dir", "x"], "--run-dir is said by --bucket"),
        (["--cpus", "2", "--", "--checkpoint_dir=x"], "--checkpoint-dir is said by"),
    ],
)
def test_mistakes(options, said, capsys):
    assert gke.main(["render", CONFIG, *NEEDED, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_config_that_is_not_in_the_image(tmp_path, capsys):
    for path in (tmp_path / "none.py", Path(__file__).parent):
        assert gke.main(["render", str(path), *NEEDED, "--cpus", "2"]) == 2
    (tmp_path / "x.py").write_text("")
    assert gke.main(["render", str(tmp_path / "x.py"), *NEEDED, "--cpus", "2"]) == 2
    assert "is outside of" in capsys.readouterr().err


# --- With a stub kubectl --------------------------------------------------------------

KUBECTL = """#!{python}
import json, sys
from pathlib import Path
folder = Path({folder!r})
given = "" if "logs" in sys.argv else sys.stdin.read()
with open(folder / "calls", "a") as file:
    file.write(json.dumps([sys.argv[1:], given]) + "\\n")
what = [word for word in sys.argv[1:] if word in ("get", "apply", "delete", "logs")]
what += [word for word in sys.argv if word in ("jobsets", "pods")]
answer = folder / "-".join(what)
print(answer.read_text() if answer.exists() else "")
failure = folder / "failure"
if failure.exists():
    sys.exit(failure.read_text())
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder first on PATH, with a kubectl that gives what is in files."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stub = folder / "kubectl"
    stub.write_text(KUBECTL.format(python=sys.executable, folder=str(folder)))
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def calls(folder: Path) -> list[tuple[list[str], str]]:
    file = folder / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def put(folder: Path, condition: str | None, **more: Any) -> dict[str, Any]:
    """Makes the stub's cluster hold the JobSet r1."""
    item = document("--slice", "v5e-16", *more.pop("options", []))
    kinds = [condition] if condition else []
    conditions = [{"type": x, "status": "True", "message": "why"} for x in kinds]
    item["status"] = {"restarts": 2, "conditions": conditions}
    (folder / "get-jobsets").write_text(json.dumps(item))
    return item


def pod_of(worker: int, state: dict[str, Any], *, index: int = 0, made: str = "1"):
    return {
        "metadata": {
            "name": f"r1-w-{index}-{worker}-{made}",
            "creationTimestamp": made,
            "labels": {"jobset.sigs.k8s.io/job-index": str(index)},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(worker)},
        },
        "spec": {"nodeName": "node-1"},
        "status": {
            "phase": "Running",
            "containerStatuses": [{"name": "lm-scale", "state": state}],
        },
    }


TRAIN = ["train", CONFIG, *NEEDED, "--slice", "v5e-16"]


def test_train_applies_what_render_prints(cluster, capsys, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    assert gke.main([*TRAIN, "--context", "c1", "--namespace", "team"]) == 0
    said = capsys.readouterr().out
    (asked, _), (applied, text) = calls(cluster)
    where = ["--context", "c1", "--namespace", "team"]
    assert asked[: len(where) + 3] == [*where, "get", "jobsets", "r1"]
    assert applied == [*where, "apply", "--filename", "-"]
    assert "v5litepod-16 (4x4), until 2023-11-15" in said
    assert "launch/gke.py down r1" in said
    assert gke.main(["render", *TRAIN[1:], "--namespace", "team"]) == 0
    assert capsys.readouterr().out == text


def test_twice_makes_one(cluster, capsys):
    put(cluster, None)
    assert gke.main(TRAIN) == 2
    assert "r1 is there already (Active), and nothing was" in capsys.readouterr().err
    assert [call[0][0] for call in calls(cluster)] == ["get"]


@pytest.mark.parametrize("ended", ["Failed", "Completed"])
def test_the_same_command_goes_on_with_one_that_has_ended(cluster, ended):
    put(cluster, ended)
    assert gke.main(TRAIN) == 0
    assert [call[0][0] for call in calls(cluster)] == ["get", "delete", "apply"]
    assert "--wait" in calls(cluster)[1][0]


def test_dry_run_calls_nothing(cluster, capsys):
    (cluster / "failure").write_text("called")
    for line in (
        [*TRAIN, "--dry-run"],
        ["prepare", CONFIG, *NEEDED, "--dry-run"],
        ["down", "r1", "--dry-run"],
        ["down", "--all", "--dry-run"],
    ):
        assert gke.main(line) == 0
    said = capsys.readouterr().out
    assert "# kubectl apply --filename -\napiVersion: jobset.x-k8s.io" in said
    assert "# kubectl delete jobsets r1" in said
    assert not calls(cluster)


def test_status(cluster, capsys):
    put(cluster, None)
    states = [{"running": {}}, {"terminated": {"exitCode": 75, "reason": "Error"}}]
    pods = [pod_of(1, states[1]), pod_of(0, states[0])]
    waits = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
    waiting = {"phase": "Pending", "conditions": [waits]}
    pods.append({"metadata": pods[1]["metadata"], "status": waiting})
    (cluster / "get-pods").write_text(json.dumps({"items": pods}))
    assert gke.main(["status", "r1"]) == 0
    said = capsys.readouterr().out
    assert "r1: Active, restarts 2" in said
    assert "r1-w-0-0-1  Running, node-1" in said
    assert "r1-w-0-1-1  Running, exit status 75, Error, node-1" in said
    assert "Pending, 0/3 nodes" in said
    put(cluster, "Failed")
    assert gke.main(["status", "r1"]) == 1
    assert "Failed: why" in capsys.readouterr().out


def test_logs_of_the_newest_pod_of_a_process(cluster, capsys):
    put(cluster, None, options=["--slices", "2"])
    pods = [
        pod_of(w, {}, index=i, made=m) for i in (0, 1) for w in range(4) for m in "21"
    ]
    (cluster / "get-pods").write_text(json.dumps({"items": pods}))
    assert gke.main(["logs", "r1", "-f", "--worker", "6"]) == 0
    what = ["logs", "r1-w-1-2-2", "--container", "lm-scale", "--tail=-1", "--follow"]
    assert calls(cluster)[-1][0] == what
    assert gke.main(["logs", "r1", "--worker", "8"]) == 2
    assert "--worker 8: expected 0 to 7" in capsys.readouterr().err
    (cluster / "get-pods").write_text('{"items": []}')
    assert gke.main(["logs", "r1"]) == 1
    assert "has no pod yet" in capsys.readouterr().err


def test_list_and_down_by_label(cluster, capsys):
    item = put(cluster, "Completed")
    (cluster / "get-jobsets").write_text(json.dumps({"items": [item]}))
    assert gke.main(["list"]) == 0
    assert "r1  Completed  restarts 2  v5litepod-16 (4x4)  until 2" in (
        capsys.readouterr().out
    )
    assert gke.main(["down", "--all"]) == 0
    owner = ["--selector", "app.kubernetes.io/managed-by=lm-scale"]
    assert calls(cluster)[0][0][2:4] == owner
    assert calls(cluster)[1][0][:4] == ["delete", "jobsets", *owner]
    assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "lm-scale"
    for wrong in (["down"], ["down", "r1", "--all"]):
        assert gke.main(wrong) == 2


def test_what_is_not_there(cluster, capsys):
    for verb in ("status", "logs"):
        assert gke.main([verb, "r9"]) == 2
        assert "there is no run 'r9'" in capsys.readouterr().err
    assert gke.main(["down", "r9"]) == 0
    assert "There was nothing to delete" in capsys.readouterr().out


def test_what_kubectl_says_is_told(cluster, capsys, monkeypatch):
    (cluster / "failure").write_text('error: no matches for kind "JobSet"')
    assert gke.main(TRAIN) == 1
    error = capsys.readouterr().err
    assert 'no matches for kind "JobSet"' in error
    assert "jobset.sigs.k8s.io/docs/installation" in error
    monkeypatch.setenv("PATH", "")
    assert gke.main(TRAIN) == 1
    assert "kubectl is not installed" in capsys.readouterr().err


def test_secrets_pass_through_a_pipe_only(cluster, capsys, monkeypatch):
    canary = "canary-5f3e9a"
    monkeypatch.setenv("HF_TOKEN", canary)
    assert gke.main(["secret", "keys", "--dry-run"]) == 0
    assert not calls(cluster)
    assert gke.main(["secret", "keys"]) == 0
    ((argv, text),) = calls(cluster)
    made = json.loads(text)
    assert base64.b64decode(made["data"]["HF_TOKEN"]).decode() == canary
    assert list(made["data"]) == ["HF_TOKEN"]
    assert "--server-side" in argv  # without a copy in an annotation
    assert gke.main([*TRAIN, "--secret", "keys"]) == 0
    assert gke.main([*TRAIN, "--secret", "keys", "--dry-run"]) == 0
    assert gke.main([*TRAIN, "--", "--hub", f"x-{canary}"]) == 2
    shown = "".join(capsys.readouterr())
    hidden = base64.b64encode(canary.encode()).decode()
    sent = [json.dumps(call) for call in calls(cluster)[1:]] + argv
    for text in (shown, *sent):
        assert canary not in text and hidden not in text
    assert "the value of HF_TOKEN is in the arguments" in shown
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(
        made, kubernetes_validate.latest_version(), strict=True
    )


def test_no_secret_without_a_key(cluster, capsys):
    assert gke.main(["secret", "keys"]) == 2
    assert "neither of WANDB_API_KEY, HF_TOKEN is set" in capsys.readouterr().err


# --- The image ------------------------------------------------------------------------

DOCKER = """#!{python}
import json, sys, tarfile
from pathlib import Path
with open({folder!r} + "/docker-calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "build":
    tarfile.open({folder!r} + "/context.tar", "w").add(".")
sys.exit(int(Path({folder!r} + "/fails").exists()))
"""


@pytest.fixture
def docker(cluster):
    stub = cluster / "docker"
    stub.write_text(DOCKER.format(python=sys.executable, folder=str(cluster)))
    stub.chmod(0o755)
    return cluster


def docker_calls(folder: Path) -> list[list[str]]:
    file = folder / "docker-calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_build_sends_a_commit_and_what_was_changed(docker, capsys):
    assert gke.main(["build", "--image", "eu.pkg.dev/p/i", "--dry-run"]) == 0
    assert not docker_calls(docker)
    planned = capsys.readouterr().out
    assert gke.main(["build", "--image", "eu.pkg.dev/p/i", "--device", "gpu"]) == 0
    said = capsys.readouterr().out
    made, push = docker_calls(docker)
    image = push[1]
    assert image.startswith("eu.pkg.dev/p/i:") and image.endswith("-gpu")
    assert f"--image {image}" in said
    assert planned.splitlines()[-1][:30] == f"--image {image}"[:30]
    assert f"EXTRAS={EXTRAS['gpu']}" in made and image in made
    with tarfile.open(docker / "context.tar") as context:
        names = {name.removeprefix("./") for name in context.getnames()}
        facts = context.extractfile("./source.json")
        assert facts is not None
        source = json.load(facts)
    assert {"setup.py", "launch/Dockerfile", "lm_scale/__main__.py"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv"))]
    assert f"org.opencontainers.image.revision={source['commit']}" in made
    assert source["tree"][:12] in image
    (docker / "fails").touch()
    assert gke.main(["build", "--image", "eu.pkg.dev/p/i"]) == 1
    assert "docker build ended with status 1" in capsys.readouterr().err


def test_dockerfile():
    """What can be seen without a docker daemon, which is not to be had in tests."""
    lines = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in lines.splitlines() if line.strip()]
    steps = [step for step in steps if not step[0].startswith("#")]
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert {name for name, _ in steps} <= known
    for name, rest in steps:
        if name == "COPY":
            assert all((ROOT / path).exists() for path in rest.split()[:-1]), rest
    user, command = steps[-2:]
    assert user == ["USER", "1000"] and json.loads(command[1])[0] == "lm-scale"
    default = next(rest for name, rest in steps if name == "ARG")
    assert default == f"EXTRAS={EXTRAS['tpu']}"
    setup = (ROOT / "setup.py").read_text()
    for extra in {extra for extras in EXTRAS.values() for extra in extras.split(",")}:
        assert f'"{extra}": [' in setup
    text = lines.lower()
    assert not any(word in text for word in ("token", "api_key", "password", "secret"))


# --- The command of a pod, run for real -----------------------------------------------


def start(found: dict[str, Any], replaced: dict[str, str], **env: str):
    """Starts what the container would run, with other words in place of some."""
    container = container_of(found)
    words = []
    for word in [*container["command"], *container["args"]]:
        for name, value in replaced.items():
            word = word.replace(name, value)
        words.append(word.replace("$$(", "$("))  # as Kubernetes does
    if "args" in replaced:
        words[4:] = json.loads(replaced["args"])
    told = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    return subprocess.Popen(
        words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **told, **env}, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


needs_timeout = pytest.mark.skipif(
    shutil.which("timeout") is None or sys.platform != "linux",
    reason="needs timeout of the GNU coreutils, as the image has it",
)
COUNT = """
import signal, sys
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print("ready", flush=True)
while not heard:
    signal.pause()
signal.setitimer(signal.ITIMER_REAL, 0.5)  # a second one would come by then
signal.signal(signal.SIGALRM, lambda *_: sys.exit(75 if len(heard) == 1 else 3))
while True:
    signal.pause()
"""


@needs_timeout
def test_sigterm_comes_once_and_the_status_back():
    words = json.dumps([sys.executable, "-c", COUNT])
    found = document("--slice", "v5e-16")
    with start(found, {"args": words}) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("ready\n", ""):
            pass
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    assert process.returncode == 75


@needs_timeout
def test_the_end_is_the_end():
    found = document("--cpus", "2")
    words = json.dumps([sys.executable, "-c", COUNT])
    soon = str(int(time.time()) + 2)
    with start(found, {"args": words}, LM_SCALE_END=soon) as process:
        process.communicate()
    assert process.returncode == jobset.OVER  # though it had ended with 75
    with start(found, {"args": words}, LM_SCALE_END="1") as process:
        said, _ = process.communicate()
    assert process.returncode == jobset.OVER
    assert "--max-hours of this launch are over" in said


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """A config file of a tiny run."""
    folder = tmp_path_factory.mktemp("tiny")
    file = folder / "tiny_gke.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\n"
        "from tiny import causal_run\n"
        f"config = causal_run(Path({str(folder)!r}), steps=150, save_every=50, "
        "accumulate=1, eval_every=None)\n"
    )
    return file


@needs_timeout
@pytest.mark.slow
def test_pods_train_are_stopped_and_go_on(tmp_path, tiny_config):
    """The rendered command, as two processes; a folder is the bucket."""
    found = document("--cpus", "2", "--nodes", "2")
    shared, port = tmp_path / "shared", free_port()
    replaced = {
        "configs/quickstart.py": str(tiny_config),
        "gs://b/path": str(shared / "path"),
        jobset.MOUNT: str(shared),
    }
    command = container_of(found)["args"]
    assert command[0] == "lm-scale"
    command[:1] = [sys.executable, "-m", "lm_scale"]

    def run_all() -> list[subprocess.Popen]:
        more = {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
        assert environment(found)["LM_SCALE_NUM_PROCESSES"] == "2"
        more["LM_SCALE_COORDINATOR"] = f"127.0.0.1:{port}"
        place = [{"LM_SCALE_PROCESS_ID": str(index)} for index in range(2)]
        return [start(found, replaced, **more, **one) for one in place]

    pods = run_all()
    metrics = shared / "path" / "r1" / "metrics.jsonl"
    try:
        end = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert all(pod.poll() is None for pod in pods), pods[0].communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        pods[-1].send_signal(signal.SIGTERM)  # to one: all of them stop
        said = [pod.communicate(timeout=120)[0] for pod in pods]
        assert [pod.returncode for pod in pods] == [75, 75], said
        steps = [int(path.name) for path in checkpoints(shared)]
        assert steps and 0 < max(steps) < 150
        pods = run_all()
        said = [pod.communicate(timeout=240)[0] for pod in pods]
        assert [pod.returncode for pod in pods] == [0, 0], said
        assert f"Going on from step {max(steps)}" in said[0]
    finally:
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)  # timeout, and what it runs
            pod.wait()
    assert max(int(path.name) for path in checkpoints(shared)) == 150
    assert (shared / "path" / "r1" / "eval_results.json").exists()


def checkpoints(shared: Path) -> list[Path]:
    folder = shared / "path" / "r1" / "checkpoints"
    return [path for path in folder.iterdir() if path.name.isdigit()]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
