#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains on Cloud TPU VMs: makes one, gives it the code, follows it, deletes it.

    launch/tpu.py train configs/roberta_base_norwegian.py --slice v3-8 \\
        --zone europe-west4-a --spot --bucket gs://my-bucket/runs

The training goes on when this program ends; `resume` follows it again. A VM that is
preempted is made again, and the run goes on from the bucket's newest checkpoint. After
--max-hours the VM deletes itself, whatever became of this program. What stands after --
goes to `lm-scale train`, such as -- --steps 1000 --mesh.fsdp 4.

Exit status: 0 done; 75 stopped, `resume` goes on; 1 failed; 2 wrong usage.
Needs the Google Cloud CLI (gcloud) and nothing but Python.
"""

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import source  # noqa: E402
from launch.command_line import cut, parser_of, say  # noqa: E402
from launch.errors import Refused  # noqa: E402
from launch.exists import PROG, ago, remains, until  # noqa: E402
from launch.follow import ask, read_log  # noqa: E402
from launch.gcloud import Cloud, CloudError, run_of  # noqa: E402
from launch.record import Launch, Record, check_name, names, slug  # noqa: E402
from launch.slices import find  # noqa: E402
from launch.supervise import again, close, supervise  # noqa: E402
from launch.vm import bring_up, describe, start_job, state_of  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    own, rest = cut(sys.argv[1:] if argv is None else argv)
    options = parse(own)
    for received in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(received) != signal.SIG_IGN:  # as nohup has it
            signal.signal(received, interrupt)
    try:
        return options.verb(options, rest)
    except Refused as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except CloudError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2 if error.kind == "invalid" else 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted.", file=sys.stderr)
        return 75


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# --- Verbs ----------------------------------------------------------------------------


def train(options: argparse.Namespace, rest: list[str]) -> int:
    """Makes a VM, trains on it to the end, brings the results, deletes it."""
    launch = new_launch(options, options.config, rest)
    return begin(options, launch)


def up(options: argparse.Namespace, rest: list[str]) -> int:
    """Makes a VM, sets it up and checks all its workers; it stays, for `run`."""
    expect_none(rest)
    launch = new_launch(options, None, [])
    launch.keep = True
    return begin(options, launch)


def begin(options: argparse.Namespace, launch: Launch) -> int:
    record = Record(launch.name)
    if record.exists() and (known := record.load()).status is None:
        raise Refused(
            f"{launch.name!r} was launched {ago(known.began)} and has not ended "
            f"({known.phase}). `{PROG} resume {launch.name}` goes on with it, "
            f"`{PROG} down {launch.name}` ends it; or choose another --name."
        )
    if options.dry_run:
        return rehearse(launch)
    if record.exists():
        check_moved(record.load(), launch)
        launch.owner = record.load().owner
    with record.locked():
        prepare(launch, record)
        return supervise(cloud_of(launch), launch, record)


def check_moved(known: Launch, launch: Launch) -> None:
    """Refused if the name has a VM elsewhere, which would be lost sight of."""
    elsewhere = cloud_of(known)
    if elsewhere != cloud_of(launch) and elsewhere.node(known.name) is not None:
        raise Refused(
            f"{known.name!r} still has a VM in {known.zone}: `{PROG} down "
            f"{known.name}`, or choose another --name."
        )


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Starts a config's run on the VM that `up` has made, and follows it."""
    record = Record(options.name)
    launch = record.load()
    if launch.status is None:
        raise Refused(
            f"{launch.name!r} is at work ({launch.phase}): `{PROG} resume "
            f"{launch.name}` follows it."
        )
    launch.config = source.inside(options.config)
    launch.arguments = fields(options.config, rest)
    launch.bucket = check_bucket(options.bucket) or launch.bucket
    check_needs_bucket(launch)
    if options.dry_run:
        return rehearse(launch)
    with record.locked():
        launch.status, launch.tried, launch.step = None, 0, -1
        prepare(launch, record)
        return supervise(cloud_of(launch), launch, record)


def resume(options: argparse.Namespace, rest: list[str]) -> int:
    """Goes on with a launch whose launcher has ended, wherever it stood."""
    expect_none(rest)
    record = Record(options.name)
    launch = record.load()
    if launch.status == 0:
        say(f"{launch.name} is done already")
        remains(cloud_of(launch))
        return 0
    if options.dry_run:
        return rehearse(launch)
    with record.locked():
        launch = record.load()
        if launch.status is not None:  # it had ended: another attempt
            launch.status, launch.tried = None, 0
            again(launch)
        record.down.unlink(missing_ok=True)
        if options.max_hours is not None:
            launch.max_hours, launch.rearm = options.max_hours, True
        return supervise(cloud_of(launch), launch, record)


def status(options: argparse.Namespace, rest: list[str]) -> int:
    """What is known of a launch here, of its VM, and of each worker's job."""
    expect_none(rest)
    launch = Record(options.name).load()
    cloud = cloud_of(launch, options.dry_run)
    print(
        f"{launch.name}: {describe(launch)}; {launch.phase}, attempt {launch.job}, "
        f"began {ago(launch.began)}, deletes itself {until(launch.deadline)}"
    )
    node = None if cloud.dry_run else cloud.node(launch.name)
    if cloud.dry_run or state_of(node) == "READY":
        for number, one in sorted(ask(cloud, launch).items()):
            end = f"ended with {one['status']}" if "status" in one else "running"
            if not one["alive"] and "status" not in one:
                end = "its process was killed"
            step = f", step {one['step']}" if one.get("step") else ""
            print(f"  worker {number}: {one.get('stage', 'no job')}, {end}{step}")
    remains(cloud)
    return 0


def logs(options: argparse.Namespace, rest: list[str]) -> int:
    """What workers have printed; with -f, and go on."""
    expect_none(rest)
    launch = Record(options.name).load()
    cloud = cloud_of(launch, options.dry_run)
    hosts = launch.made().hosts
    if options.worker != "all" and not (
        options.worker.isdecimal() and int(options.worker) < hosts
    ):
        raise Refused(f"--worker {options.worker}: expected 0 to {hosts - 1} or all.")
    workers = range(hosts) if options.worker == "all" else [int(options.worker)]
    at = dict.fromkeys(workers, 0)
    while True:
        for worker in workers:
            while text := read_log(cloud, launch, at[worker], worker):
                at[worker] += len(text)
                mark = f"[{worker}] " if len(at) > 1 else ""
                for line in text.decode(errors="replace").splitlines():
                    print(mark + line, flush=True)
        if not options.follow or cloud.dry_run:
            remains(cloud, out=sys.stderr)
            return 0
        time.sleep(launch.poll)


def ssh(options: argparse.Namespace, rest: list[str]) -> int:
    """A shell on a worker, or a command after --."""
    launch = Record(options.name).load()
    cloud = cloud_of(launch, options.dry_run)
    code = cloud.shell(options.name, options.worker, rest)
    remains(cloud, out=sys.stderr)
    return min(code, 1)


def down(options: argparse.Namespace, rest: list[str]) -> int:
    """Deletes the VMs of a launch, or of all (--all); checks that none is left."""
    expect_none(rest)
    if (options.name is None) == (not options.all):
        raise Refused("down: expected a launch's name, or --all.")
    if options.name is not None:
        check_name(options.name)
    failed = False
    for cloud in clouds(options):
        try:
            failed |= take_down(cloud, options.name)
        except CloudError as error:  # the others are to go all the same
            print(f"{PROG}: {error}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


def take_down(cloud: Cloud, name: str | None) -> bool:
    """Deletes what launches have made in a zone, one or all; if something is left."""
    if cloud.dry_run:
        cloud.delete(name or "NAME", queued=True)
        return False
    found = cloud.all()
    queues = [one for kind, one in found if kind == "queue"]
    for run in sorted({str(run_of(one, queues)) for _, one in found}):
        if name in (None, run):
            kinds = {kind for kind, one in found if run_of(one, queues) == run}
            say(f"deleting {run} ({' and '.join(sorted(kinds))}) in {cloud.zone}")
            close(run)
            cloud.delete(run, queued="queue" in kinds)
    if name is not None:
        close(name)
    return any(name in (None, run) for run in remains(cloud))


def list_all(options: argparse.Namespace, rest: list[str]) -> int:
    """All that launches have made and that still exists, with what it has cost."""
    expect_none(rest)
    for cloud in clouds(options):
        remains(cloud, options.price)
    return 0


# --- A launch -------------------------------------------------------------------------


def new_launch(
    options: argparse.Namespace, config: str | None, rest: list[str]
) -> Launch:
    """What the options ask for; Refused, before anything costs, if it cannot be."""
    made = find(options.slice)
    name = check_name(options.name or slug(config or made.name))
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", options.zone):
        raise Refused(
            f"zone {options.zone!r}: expected one such as {made.generation.zone}."
        )
    for flag in ("max_hours", "wait_hours", "poll", "price"):
        value = getattr(options, flag)
        if value is not None and not value > 0:
            raise Refused(f"--{flag.replace('_', '-')} {value}: expected more than 0.")
    bucket = check_bucket(options.bucket)
    launch = Launch(
        name=name, slice=made.name, zone=options.zone, project=options.project,
        spot=options.spot, queued=options.queued, runtime=options.runtime,
        options=options.create, bucket=bucket, max_hours=options.max_hours,
        price=options.price, attempts=options.attempts, keep=options.keep,
        wait_hours=options.wait_hours, poll=options.poll,
        config=None if config is None else source.inside(config),
        arguments=fields(config, rest),
    )  # fmt: skip
    check_needs_bucket(launch)
    return launch


def check_needs_bucket(launch: Launch) -> None:
    """Refused if the run's checkpoints would be where they cannot stay."""
    if launch.config is None or launch.bucket is not None:
        return
    if launch.spot:
        raise Refused(
            "--spot without --bucket: a spot VM may be gone at any moment, and its "
            "disk with it. Give --bucket gs://BUCKET/FOLDER for the checkpoints."
        )
    if launch.made().hosts > 1:
        raise Refused(
            f"{launch.slice} without --bucket: its {launch.made().hosts} VMs share no "
            f"folder. Give --bucket gs://BUCKET/FOLDER for the checkpoints."
        )
    say(f"without --bucket the checkpoints go with the VM, in {launch.max_hours:g} h")


def check_bucket(bucket: str | None) -> str | None:
    """gs://..., or a folder that all VMs mount."""
    if bucket is not None and not re.match(r"gs://[a-z0-9]|/", bucket):
        raise Refused(
            f"--bucket {bucket!r}: expected gs://BUCKET/FOLDER, or an absolute path "
            f"that is mounted on all VMs."
        )
    return bucket.rstrip("/") if bucket else None


def fields(config: str | None, rest: list[str]) -> list[str]:
    """The arguments of `lm-scale train`, if it would take them; Refused if not."""
    for one in rest:
        if one.split("=")[0].replace("_", "-") in ("--run-dir", "--checkpoint-dir"):
            raise Refused(
                f"{one}: the launch sets it: the run is in lm_scale/NAME/runs on the "
                f"VM, its checkpoints are in --bucket."
            )
    if config is not None:
        check_config(config, rest)
    return rest


def check_config(config: str, rest: list[str]) -> None:
    """Loads the config here, where lm_scale is installed: a typo costs no VM."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        from lm_scale.__main__ import config_from
        from lm_scale.errors import InputError
    except ImportError as error:
        say(f"the config is not checked here: {error}")
        return
    try:
        config_from("train", "", [config, *rest])
    except InputError as error:
        raise Refused(f"{config}: {error}") from None


def prepare(launch: Launch, record: Record) -> None:
    """Takes the code as it is now, and writes down what is about to be done."""
    config = launch.config and str(source.ROOT / launch.config)
    sent = source.snapshot(config)
    launch.commit, launch.tree = sent.commit, sent.tree
    again(launch)
    record.folder.mkdir(parents=True, exist_ok=True)
    record.down.unlink(missing_ok=True)
    part = record.folder / "part.tar.gz"
    source.pack(sent, part)
    os.replace(part, record.code)
    record.changes.write_text(sent.diff)
    record.save(launch)  # last: what it names is there
    changed = f" and changes ({len(sent.diff.splitlines())} lines)" if sent.diff else ""
    say(f"sending commit {sent.commit[:12]}{changed}; kept in {record.folder}")
    if sent.left:
        say(f"not sent, as git does not know them: {', '.join(sent.left[:5])}"
            f"{' ...' if len(sent.left) > 5 else ''}")  # fmt: skip


def rehearse(launch: Launch) -> int:
    """Prints the gcloud commands of a launch in which nothing goes wrong."""
    cloud, record = cloud_of(launch, dry_run=True), Record(launch.name)
    bring_up(cloud, launch, record)
    start_job(cloud, launch, record)
    read_log(cloud, launch, 0)
    if not launch.keep:
        cloud.delete(launch.name, queued=launch.queued)
    return 0


def cloud_of(launch: Launch, dry_run: bool = False) -> Cloud:
    return Cloud(launch.zone, launch.project, dry_run)


def clouds(options: argparse.Namespace) -> list[Cloud]:
    """The zones that were asked for, or those of all launches known here."""
    known = [Record(name).load() for name in names()]
    if options.zone is not None:
        places = {(options.zone, options.project)}
    else:
        asked = getattr(options, "name", None)
        places = {(x.zone, x.project) for x in known if asked in (None, x.name)}
    if not places:
        raise Refused("no launch is known here: give --zone.")
    return [Cloud(zone, project, options.dry_run)
            for zone, project in sorted(places, key=str)]  # fmt: skip


# --- Options --------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(PROG, __doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Any) -> argparse.ArgumentParser:
        about = function.__doc__.split("\n")[0]
        added = verbs.add_parser(
            name, help=about, description=about, allow_abbrev=False
        )
        added.set_defaults(verb=function)
        added.add_argument("--dry-run", action="store_true",
                           help="print the gcloud commands, run none")  # fmt: skip
        return added

    for name, function in (("train", train), ("up", up)):
        added = verb(name, function)
        if name == "train":
            added.add_argument("config", help="configs/...py")
        add_launch_options(added)
    added = verb("run", run)
    added.add_argument("name")
    added.add_argument("config", help="configs/...py")
    added.add_argument("--bucket", help="for the checkpoints, gs://BUCKET/FOLDER")
    added = verb("resume", resume)
    added.add_argument("name")
    added.add_argument("--max-hours", type=float, help="another limit, from its begin")
    verb("status", status).add_argument("name")
    added = verb("logs", logs)
    added.add_argument("name")
    added.add_argument("--worker", default="0", help="which one, or all (0)")
    added.add_argument("-f", "--follow", action="store_true", help="and go on")
    added = verb("ssh", ssh)
    added.add_argument("name")
    added.add_argument("--worker", default="0", help="which one, or all (0)")
    for name, function in (("down", down), ("list", list_all)):
        added = verb(name, function)
        if name == "down":
            added.add_argument("name", nargs="?")
            added.add_argument("--all", action="store_true", help="of all launches")
        else:
            added.add_argument("--price", type=float, help="of a slice, an hour")
        added.add_argument("--zone", help="only there (all zones of known launches)")
        added.add_argument("--project", help="(gcloud's own)")
    return parser.parse_args(argv)


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--slice", required=True, help="v3-8, v4-32, v5e-16, v5p-64, v6e-8 ...")
    add("--zone", required=True, help="such as europe-west4-a")
    add("--project", help="(gcloud's own)")
    add("--name", help="of the launch, its VM and its folder (the config's)")
    add("--bucket", help="gs://BUCKET/FOLDER for the checkpoints; needed with --spot")
    add("--spot", action="store_true", help="cheaper, may be taken away at any moment")
    add("--queued", action="store_true", help="wait in the queue for capacity")
    add("--max-hours", type=float, default=24.0, metavar="H",
        help="after which the VM deletes itself, training or not (24)")  # fmt: skip
    add("--wait-hours", type=float, default=4.0, metavar="H", help="for a VM (4)")
    add("--attempts", type=int, default=10, metavar="N",
        help="in a row that bring the run no further, then give up (10)")  # fmt: skip
    add("--price", type=float, help="of the slice, an hour, for `list`")
    add("--keep", action="store_true", help="the VM, when the run has ended")
    add("--runtime", help="another image than the slice's own")
    add("--create", action="append", default=[], metavar="FLAG",
        help="of gcloud's create, such as --create=--network=other")  # fmt: skip
    add("--poll", type=float, default=15.0, metavar="S", help="between two looks (15)")


def expect_none(rest: list[str]) -> None:
    if rest:
        raise Refused(f"unknown arguments: {' '.join(rest)}")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
