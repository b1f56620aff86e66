# SPDX-License-Identifier: Apache-2.0
"""What launches have made and that still exists: its names, ages and costs."""

import time
from datetime import UTC, datetime
from typing import Any, TextIO

from launch.gcloud import Cloud, CloudError, labels_of, run_of
from launch.record import Record
from launch.vm import state_of

PROG = "launch/tpu.py"


def remains(
    cloud: Cloud, price: float | None = None, out: TextIO | None = None
) -> list[str]:
    """Prints all that launches have made in the zone and that exists; its names."""
    if cloud.dry_run:
        return []
    found = cloud.all()
    queues = [one for kind, one in found if kind == "queue"]
    runs = [str(run_of(one, queues)) for _, one in found]
    for run, (kind, one) in zip(runs, found, strict=True):
        print(f"exists: {line_of(run, kind, one, cloud, price)}", file=out)
    if not found:
        print(f"exists: nothing that a launch has made, in {cloud.zone}", file=out)
    return runs


def line_of(
    name: str, kind: str, one: dict[str, Any], cloud: Cloud, price: float | None
) -> str:
    record = Record(name)
    price = price or (record.load().price if record.exists() else None)
    facts = [f"{kind} {name}", cloud.zone, str(one.get("acceleratorType", "")),
             str(state_of(one))]  # fmt: skip
    if "createTime" in one:
        made = datetime.fromisoformat(one["createTime"].replace("Z", "+00:00"))
        hours = (datetime.now(UTC) - made).total_seconds() / 3600
        facts.append(f"{hours:.1f} h")
        if price is not None and kind == "VM":
            facts.append(f"cost {hours * price:.2f} so far, at {price:g} an hour")
    if expires := labels_of(one).get("lm-scale-expires"):
        facts.append(f"deletes itself {until(int(expires))}")
    return ", ".join(filter(None, facts)) + f"; end it: {PROG} down {name}"


def remains_if_possible(cloud: Cloud) -> None:
    """After an error that may be the connection's: as well as it goes."""
    try:
        remains(cloud)
    except CloudError as error:
        print(f"What still exists in {cloud.zone} is not known: {error.said}")


def ago(then: float) -> str:
    return f"{(time.time() - then) / 3600:.1f} h ago"


def until(then: float) -> str:
    hours = (then - time.time()) / 3600
    return f"in {hours:.1f} h" if hours > 0 else "now"
