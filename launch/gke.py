#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains on Google Kubernetes Engine: on TPU slices, GPU nodes or CPUs.

    launch/gke.py build --image REPOSITORY [--device tpu|gpu|cpu]
    launch/gke.py train configs/x.py --name N --image IMAGE --slice v5e-16 \\
        --bucket gs://b/path [-- --field value ...]
    launch/gke.py prepare CONFIG ...      the same run's tokens, on a CPU node, before
    launch/gke.py render CONFIG ...       prints what `train` would apply
    launch/gke.py secret NAME             WANDB_API_KEY, HF_TOKEN as a Secret
    launch/gke.py status|logs|down NAME
    launch/gke.py list

Needs kubectl with a cluster that has JobSet, and for `build` docker and git.
"""

import argparse
import base64
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch import gke_nodes, jobset  # noqa: E402
from launch.command_line import KEYS, cut, keys, parser_of  # noqa: E402
from launch.errors import Failed, Refused  # noqa: E402
from launch.gke_nodes import Hardware  # noqa: E402
from launch.image import EXTRAS, build  # noqa: E402
from launch.jobset import MANAGED, Work  # noqa: E402
from launch.kubectl import (  # noqa: E402
    existing,
    find,
    get,
    how,
    kubectl,
    kubectl_command,
    place,
    pods,
    restarts,
    state,
)
from launch.source import inside  # noqa: E402
from launch.yaml_text import to_yaml  # noqa: E402

FOLDERS = ("run-dir", "checkpoint-dir")  # what --bucket and --name say
OWNER = ",".join(f"{key}={value}" for key, value in MANAGED.items())
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"  # what Kubernetes takes for a name
NAME = 40  # characters: pods add some, and may have 63


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; 0 done, 1 failed, 2 wrong usage."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        return options.verb(options) or 0
    except (Refused, Failed) as error:
        print(f"launch/gke.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failed) else 2


def parse(argv: list[str]) -> argparse.Namespace:
    own, overrides = cut(argv)
    parser = parser_of("launch/gke.py", __doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    cluster = argparse.ArgumentParser(add_help=False)
    cluster.add_argument("--namespace", help="of Kubernetes (kubectl's own)")
    cluster.add_argument("--context", help="of kubectl: which cluster (its own)")
    dry = argparse.ArgumentParser(add_help=False)
    dry.add_argument(
        "--dry-run", action="store_true", help="print what would be done; do nothing"
    )

    def verb(name: str, what: Any, about: str, *parents: argparse.ArgumentParser):
        made = verbs.add_parser(name, help=about, description=about, parents=parents)
        made.set_defaults(verb=what)
        return made

    run = work_options()
    verb("train", train, "start a run, or go on with it", run, cluster, dry)
    verb("render", show, "print the JobSet of `train`", run, cluster)
    verb("prepare", train, "make a run's tokens on a CPU node", run, cluster, dry)
    image = verb("build", build, "build the image of this code, and push it", dry)
    image.add_argument("--image", required=True, help="repository, or image with a tag")
    image.add_argument("--device", choices=EXTRAS, default="tpu", help="(tpu)")
    image.add_argument("--config", help="a config file that git does not know yet")
    verb("secret", secret, f"keep {', '.join(KEYS)}", cluster, dry).add_argument("name")
    verb("list", list_, "what was launched here and not deleted", cluster)
    verb("status", status, "of a run and its pods", cluster).add_argument("name")
    log = verb("logs", logs, "of one process", cluster)
    log.add_argument("name")
    log.add_argument("-f", "--follow", action="store_true")
    log.add_argument("--worker", type=int, default=0, help="which process (0)")
    end = verb("down", down, "end a run and delete it; its bucket stays", cluster, dry)
    end.add_argument("name", nargs="?")
    end.add_argument("--all", action="store_true", help="all that were launched")
    options = parser.parse_args(own)
    options.overrides, options.what = overrides, own[0]
    if overrides and "config" not in options:
        parser.error(f"unexpected arguments after --: {shlex.join(overrides)}")
    return options


def work_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a Python file of this checkout")
    add("--name", required=True, help="of the run: the same one goes on with it")
    add("--image", required=True, help="what `build` has pushed")
    add("--bucket", required=True, help="gs://bucket/path, for all that a run writes")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--slice", help="TPU slice: v5e-16, v5p-8, tpu7x-128")
    kind.add_argument("--gpu", help="GPU, as GKE names it: nvidia-h100-80gb")
    kind.add_argument("--cpus", type=int, help="cores, for nodes without accelerator")
    add("--slices", type=int, default=1, help="so many TPU slices as one run (1)")
    add("--gpus-per-node", type=int, default=8, help="(8)")
    add("--nodes", type=int, default=1, help="of GPUs or CPUs: one process each (1)")
    add("--memory", default="32Gi", help="of a node without accelerator (32Gi)")
    add("--spot", action="store_true", help="cheaper nodes that may be taken away")
    add("--max-hours", type=float, default=24, help="from now to the end (24)")
    add("--max-restarts", type=int, default=20, help="after preemptions (20)")
    add("--volume", help="a PersistentVolumeClaim (ReadWriteMany) for the run's folder")
    add("--secret", help="a Secret whose keys become variables: see `secret`")
    add("--service-account", help="of Kubernetes, that may write to the bucket")
    add("--queue", help="a local queue of Kueue")
    return parser


# --- Work -----------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """Applies the JobSet; one of that name that has ended makes place for it."""
    document = rendered(options)
    name = document["metadata"]["name"]
    text = to_yaml(document)
    apply = ["apply", "--filename", "-"]
    if options.dry_run:
        print(f"# {shlex.join(kubectl_command(options, *apply))}\n{text}", end="")
        return 0
    there = find(options, name)
    if there is not None and state(there) not in ("Completed", "Failed"):
        raise Refused(
            f"{name} is there already ({state(there)}), and nothing was changed. "
            f"Follow it: launch/gke.py logs -f {name}; end it: launch/gke.py down "
            f"{name}."
        )
    if there is not None:
        print(f"{name} had ended ({state(there)}): started again.")
        delete(options, name)
    kubectl(options, *apply, stdin=text)
    notes = document["metadata"]["annotations"]
    print(f"{name}: {notes['lm-scale/hardware']}, until {notes['lm-scale/ends']}")
    print(f"  {notes['lm-scale/command']}")
    print(f"  launch/gke.py logs -f {name}; launch/gke.py down {name}")
    return 0


def show(options: argparse.Namespace) -> None:
    print(to_yaml(rendered(options)), end="")


def rendered(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet that the options mean; Refused for what cannot be."""
    check(options)
    prepares = options.what == "prepare"
    seconds = round(options.max_hours * 3600)
    work = Work(
        name=f"{options.name}-prepare" if prepares else options.name,
        image=options.image,
        arguments=(
            "prepare" if prepares else "train",
            inside(options.config),
            *options.overrides,
        ),
        bucket=options.bucket.rstrip("/"),
        hardware=cores(options) if prepares else hardware(options),
        end=int(time.time()) + seconds,
        seconds=seconds,
        max_restarts=options.max_restarts,
        run=options.name,
        namespace=options.namespace,
        volume=options.volume,
        secret=options.secret,
        service_account=options.service_account,
        queue=options.queue,
        spot=options.spot,
    )
    document = jobset.render(work)
    check_no_secret(to_yaml(document) + shlex.join(options.overrides))
    return document


def hardware(options: argparse.Namespace) -> Hardware:
    if options.slices > 1 and not options.slice:
        raise Refused("--slices is of TPUs: give --slice too, or use --nodes.")
    if options.slice:
        return gke_nodes.tpu(options.slice, options.slices)
    if options.gpu:
        return gke_nodes.gpu(options.gpu, options.gpus_per_node, options.nodes)
    if options.cpus:
        return cores(options)
    raise Refused("what to train on? Give --slice v5e-16, --gpu NAME or --cpus N.")


def cores(options: argparse.Namespace) -> Hardware:
    prepares = options.what == "prepare"
    nodes = 1 if prepares else options.nodes
    return gke_nodes.cpu(options.cpus or 8, options.memory, nodes)


def check(options: argparse.Namespace) -> None:
    """Refused for what Kubernetes would refuse later, or worse, would not."""
    if not re.fullmatch(LABEL, options.name) or len(options.name) > NAME:
        raise Refused(
            f"--name {options.name!r}: expected small letters, digits and hyphens, "
            f"{NAME} at most, with a letter or digit at both ends."
        )
    for flag in ("namespace", "volume", "secret", "service_account", "queue", "gpu"):
        value = getattr(options, flag)
        if value is not None and not re.fullmatch(rf"{LABEL}(\.{LABEL})*", value):
            dashed = flag.replace("_", "-")
            raise Refused(f"--{dashed} {value!r}: this is no name in Kubernetes.")
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]*(/[\w-][\w.-]*)*/?", options.bucket):
        raise Refused(f"--bucket {options.bucket!r}: expected gs://bucket/path.")
    if not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:\w+)?",
                        options.image):  # fmt: skip
        raise Refused(f"--image {options.image!r}: expected REPOSITORY:TAG.")
    if not re.fullmatch(r"\d+([KMGT]i?)?", options.memory):
        raise Refused(f"--memory {options.memory!r}: expected such as 32Gi.")
    for flag in ("slices", "gpus_per_node", "nodes", "cpus", "max_hours"):
        value = getattr(options, flag)
        if value is not None and not 0 < value < 10_000:
            dashed = flag.replace("_", "-")
            raise Refused(f"--{dashed} {value:g}: expected a number above 0.")
    if options.max_restarts < 0:
        raise Refused(f"--max-restarts {options.max_restarts}: expected 0 or more.")
    for word in options.overrides:
        field = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and field in FOLDERS:
            raise Refused(f"--{field} is said by --bucket and --name: leave it out.")


def check_no_secret(text: str) -> None:
    """Refused if a key is in what is sent: others could read it there."""
    for name, value in keys().items():
        if len(value) > 7 and value in text:
            raise Refused(
                f"the value of {name} is in the arguments. Leave it out: "
                f"`launch/gke.py secret NAME` keeps it, --secret NAME hands it over."
            )


# --- Secrets --------------------------------------------------------------------------


def secret(options: argparse.Namespace) -> None:
    """Makes a Secret of the environment's keys, which pass through a pipe only."""
    found = keys()
    if not re.fullmatch(LABEL, options.name):
        raise Refused(f"secret {options.name!r}: this is no name in Kubernetes.")
    if not found:
        raise Refused(f"neither of {', '.join(KEYS)} is set in the environment.")
    document = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": options.name, "labels": MANAGED},
        "data": {
            name: base64.b64encode(value.encode()).decode()
            for name, value in found.items()
        },
    }
    # On the server's side: kubectl's own apply would keep a copy in an annotation.
    apply = ["apply", "--server-side", "--force-conflicts", "--filename", "-"]
    if options.dry_run:
        print(f"# {shlex.join(kubectl_command(options, *apply))}")
        print(f"# with the values of {', '.join(found)}")
        return
    kubectl(options, *apply, stdin=json.dumps(document))
    print(f"Secret {options.name}: {', '.join(found)}. Use it: --secret {options.name}")


# --- What is there --------------------------------------------------------------------


def list_(options: argparse.Namespace) -> None:
    found = get(options, "jobsets", "--selector", OWNER)["items"]
    if not found:
        print("Nothing that was launched from here is there.")
    for item in found:
        notes = item["metadata"].get("annotations", {})
        print(
            f"{item['metadata']['name']}  {state(item)}  restarts {restarts(item)}  "
            f"{notes.get('lm-scale/hardware')}  until {notes.get('lm-scale/ends')}"
        )


def status(options: argparse.Namespace) -> int:
    """0: it runs, waits or is done; 1: it has failed."""
    item = existing(options, options.name)
    notes = item["metadata"].get("annotations", {})
    print(f"{options.name}: {state(item)}, restarts {restarts(item)}")
    print(f"  {notes.get('lm-scale/command')}")
    print(f"  {notes.get('lm-scale/hardware')}, until {notes.get('lm-scale/ends')}")
    for condition in item.get("status", {}).get("conditions", []):
        if condition["status"] == "True":
            print(f"  {condition['type']}: {condition.get('message', '')}")
    for pod in pods(options, options.name):
        print(f"  {pod['metadata']['name']}  {how(pod)}")
    return 1 if state(item) == "Failed" else 0


def logs(options: argparse.Namespace) -> int:
    item = existing(options, options.name)
    workers = item["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"]
    slices = item["spec"]["replicatedJobs"][0].get("replicas", 1)
    if not 0 <= options.worker < workers * slices:
        raise Refused(
            f"--worker {options.worker}: expected 0 to {workers * slices - 1}."
        )
    index, worker = divmod(options.worker, workers)
    found = [
        pod["metadata"]["name"]
        for pod in pods(options, options.name)
        if pod["metadata"]["labels"].get("jobset.sigs.k8s.io/job-index") == str(index)
        and place(pod) == worker
    ]
    if not found:
        raise Failed(f"process {options.worker} of {options.name} has no pod yet.")
    follow = ["--follow"] if options.follow else []
    command = kubectl_command(
        options,
        "logs",
        found[-1],
        "--container",
        jobset.CONTAINER,
        "--tail=-1",
        *follow,
    )
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL).returncode and 1
    except KeyboardInterrupt:
        return 0


def down(options: argparse.Namespace) -> None:
    if bool(options.name) == options.all:
        raise Refused("down: give the name of a run, or --all.")
    which = ["--selector", OWNER] if options.all else [options.name]
    command = ["delete", "jobsets", *which, "--ignore-not-found", "--wait"]
    if options.dry_run:
        print(f"# {shlex.join(kubectl_command(options, *command))}")
        return
    said = kubectl(options, *command).strip()
    print(said or "There was nothing to delete.")
    print("What runs have written stays in their buckets.")


def delete(options: argparse.Namespace, name: str) -> None:
    kubectl(options, "delete", "jobsets", name, "--ignore-not-found", "--wait")


if __name__ == "__main__":
    sys.exit(main())
