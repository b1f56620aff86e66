# SPDX-License-Identifier: Apache-2.0
"""A command of lm-scale as a Kubernetes JobSet for GKE: options in, a document out.

A JobSet starts its pods together, gives each a DNS name (by a headless Service of its
own) and starts all of them again when one fails. One pod is one process, on one VM. The
bucket is mounted in all of them, as the processes of a run share its folder;
checkpoints go to the bucket directly.
"""

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from launch.gke_nodes import Hardware

MOUNT = "/bucket"  # where pods see the bucket, or the volume in its place
JOB = "w"  # names are short: a pod is NAME-w-SLICE-WORKER
CONTAINER = "lm-scale"
PORT = 8476  # where process 0 listens
GRACE = 120  # s from SIGTERM to SIGKILL: a save must fit in
START = 1800  # s for all pods to come: nodes are made, images pulled
KEPT = 3 * 24 * 3600  # s that a finished JobSet can be looked at
OVER = 124  # the exit status of timeout(1) when the time is over
FINAL = (1, 2, OVER)  # exit statuses after which another try would end as this one
MANAGED = {"app.kubernetes.io/managed-by": "lm-scale"}


@dataclass(frozen=True)
class Work:
    """What a JobSet is to do, and where."""

    name: str
    image: str
    arguments: tuple[str, ...]  # COMMAND CONFIG [--field value ...] of lm-scale
    bucket: str  # gs://bucket or gs://bucket/path
    hardware: Hardware
    end: int  # when all has to be over, in seconds since 1970
    seconds: int  # that one try may take
    max_restarts: int
    run: str  # the run's name, whose folder it works in
    namespace: str | None = None
    volume: str | None = None  # a PersistentVolumeClaim in place of the mounted bucket
    secret: str | None = None  # whose keys become variables
    service_account: str | None = None
    queue: str | None = None  # a LocalQueue of Kueue
    spot: bool = False

    @property
    def folder(self) -> str:
        """The run's folder, as pods see it."""
        inside = "" if self.volume else self.bucket.removeprefix("gs://")
        path = [MOUNT, *inside.split("/")[1:], self.run]
        return "/".join(path)

    @property
    def command(self) -> list[str]:
        verb, config, *overrides = self.arguments
        where = ["--run-dir", self.folder]
        if verb == "train":
            where += ["--checkpoint-dir", f"{self.bucket}/{self.run}/checkpoints"]
        return ["lm-scale", verb, config, *where, *overrides]


def render(work: Work) -> dict[str, Any]:
    """The JobSet, as JSON values."""
    # GKE makes one TPU program of several slices where each has its own node pool.
    pools = "cloud.google.com/gke-nodepool" if work.hardware.slices > 1 else None
    annotations = {
        "lm-scale/command": shlex.join(work.command),
        "lm-scale/hardware": work.hardware.title,
        "lm-scale/ends": datetime.fromtimestamp(work.end, UTC).isoformat(),
        "alpha.jobset.sigs.k8s.io/exclusive-topology": pools,
    }
    queue = {"kueue.x-k8s.io/queue-name": work.queue} if work.queue else {}
    metadata = {
        "name": work.name,
        "namespace": work.namespace,
        "labels": {**MANAGED, **queue},
        "annotations": kept(annotations),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": kept(metadata),
        "spec": {
            # The Service that gives pods their names.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": failure_policy(work.max_restarts),
            "ttlSecondsAfterFinished": KEPT,
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": work.hardware.slices,
                    "template": {"spec": job(work)},
                }
            ],
        },
    }


def failure_policy(max_restarts: int) -> dict[str, Any]:
    """Whatever no rule names starts all pods again, so many times: 75, a lost node."""
    return {
        "maxRestarts": max_restarts,
        # No pod starts before the last old one has gone: one trainer holds the lock.
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": "failed",  # by its exit status, see `job`
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
            {
                "name": "timeIsOver",
                "action": "FailJobSet",
                "onJobFailureReasons": ["DeadlineExceeded"],
            },
        ],
    }


def job(work: Work) -> dict[str, Any]:
    """The Job of a slice: one pod a VM, which know their place by their index."""
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    final = {"containerName": CONTAINER, "operator": "In", "values": list(FINAL)}
    return {
        "completionMode": "Indexed",
        "completions": work.hardware.pods,
        "parallelism": work.hardware.pods,
        "backoffLimit": 0,
        "activeDeadlineSeconds": work.seconds + 2 * GRACE,  # waiting for nodes, too
        "podFailurePolicy": {
            "rules": [
                {"action": "Count", "onPodConditions": [disrupted]},
                {"action": "FailJob", "onExitCodes": final},
            ]
        },
        "template": pod(work),
    }


def pod(work: Work) -> dict[str, Any]:
    selector = dict(work.hardware.selector)
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
    if work.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "serviceAccountName": work.service_account,
        "nodeSelector": selector,
        "tolerations": [{**spot, "effect": "NoSchedule"}] if work.spot else [],
        "securityContext": {"fsGroup": 1000},
        "containers": [container(work)],
        "volumes": [
            {"name": "bucket", **volume(work)},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    # The sidecar that mounts the bucket may keep what it has read on the node's disk.
    annotations = {
        "gke-gcsfuse/volumes": "true",
        "gke-gcsfuse/ephemeral-storage-limit": "0",
    }
    metadata = {"labels": MANAGED, "annotations": {} if work.volume else annotations}
    return {"metadata": kept(metadata), "spec": kept(spec)}


def volume(work: Work) -> dict[str, Any]:
    if work.volume:
        return {"persistentVolumeClaim": {"claimName": work.volume}}
    options = (
        "implicit-dirs", "uid=1000", "gid=1000", "file-mode=664", "dir-mode=775",
        # Other pods' files are seen at once; tokens, read at random, are kept on disk.
        "metadata-cache:ttl-secs:0", "file-cache:max-size-mb:-1",
        "file-cache:cache-file-for-range-read:true",
    )  # fmt: skip
    attributes = {
        "bucketName": work.bucket.removeprefix("gs://").split("/")[0],
        "mountOptions": ",".join(options),
    }
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io",
                    "volumeAttributes": attributes}}  # fmt: skip


def container(work: Work) -> dict[str, Any]:
    platform = work.hardware.platform
    ports = {"tpu": {"tpu": 8471, "megascale": 8080}}.get(platform, {"jax": PORT})
    # A TPU's memory is mapped and locked, and its device files are root's.
    rights = {"runAsUser": 0, "capabilities": {"add": ["SYS_RESOURCE"]}}
    return kept(
        {
            "name": CONTAINER,
            "image": work.image,
            "command": ["sh", "-c", script(platform), "lm-scale"],
            "args": [escaped(word) for word in work.command],
            "env": environment(work),
            "envFrom": work.secret and [{"secretRef": {"name": work.secret}}],
            "ports": [{"name": n, "containerPort": p} for n, p in ports.items()],
            "resources": work.hardware.resources,
            "securityContext": rights if platform == "tpu" else {},
            "volumeMounts": [
                {"name": "bucket", "mountPath": MOUNT},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        }
    )


def script(platform: str) -> str:
    """Runs "$@" until the end. timeout(1) passes a SIGTERM on, once, and its status."""
    lines = [
        "now=`date +%s`",  # $(...) is Kubernetes' own
        'left=`expr "$LM_SCALE_END" - "$now"`',
        'if [ "$left" -le 0 ]; then',
        '  echo "The --max-hours of this launch are over. Launch again to go on." >&2',
        f"  exit {OVER}",
        "fi",
        "ulimit -l 68719476736 || true" if platform == "tpu" else "",
        f'exec timeout --foreground --kill-after={GRACE} "$left" "$@"',
    ]
    return "\n".join(line for line in lines if line)


def escaped(word: str) -> str:
    """Kubernetes would replace $(NAME) in a command."""
    return word.replace("$(", "$$(")


def environment(work: Work) -> list[dict[str, Any]]:
    """GKE itself tells TPUs who is who; other nodes are told by this."""
    plain = {
        "PYTHONUNBUFFERED": "1",
        "LM_SCALE_END": str(work.end),
        "LM_SCALE_START_TIMEOUT": str(START),
    }
    if work.hardware.platform == "gpu":  # where GKE puts the driver's libraries
        plain["LD_LIBRARY_PATH"] = "/usr/local/nvidia/lib64"
    several = work.hardware.platform != "tpu" and work.hardware.pods > 1
    if several:
        first = f"{work.name}-{JOB}-0-0.{work.name}"
        plain["LM_SCALE_COORDINATOR"] = f"{first}:{PORT}"
        plain["LM_SCALE_NUM_PROCESSES"] = str(work.hardware.pods)
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in plain.items()
    ]
    if several:
        path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        source = {"fieldRef": {"fieldPath": path}}
        variables.append({"name": "LM_SCALE_PROCESS_ID", "valueFrom": source})
    return variables


def kept(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty."""
    empty = (None, "", [], {})
    return {name: value for name, value in values.items() if value not in empty}
