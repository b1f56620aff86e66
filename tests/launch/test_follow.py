# SPDX-License-Identifier: Apache-2.0
"""What the ends of workers, and the errors of gcloud, are taken for."""

import pytest

from launch.follow import judge
from launch.gcloud import PASSING, classify


def ended(worker: int, stage: str, status: int | None, at: float = 1.0) -> dict:
    one = {"worker": worker, "stage": stage, "alive": False}
    return one if status is None else {**one, "status": status, "ended": at}


@pytest.mark.parametrize(
    ("workers", "kind", "status", "worker"),
    [
        ([ended(0, "train", 0), ended(1, "train", 0)], "done", 0, 0),
        ([ended(0, "train", 1, 9.0), ended(1, "train", 2, 8.0)], "failed", 2, 1),
        ([ended(0, "prepare", 2)], "failed", 2, 0),
        ([ended(0, "train", 75), ended(1, "train", 75)], "stopped", 75, 0),
        # The others' connection errors are the consequence of one that is killed.
        ([ended(0, "train", 1, 1.0), ended(1, "train", None)], "broken", 1, 1),
        ([ended(0, "train", 137, 1.0), ended(1, "train", 1, 2.0)], "broken", 137, 0),
        ([ended(0, "health", 1), ended(1, "health", 0)], "broken", 1, 0),
        ([ended(0, "setup", 1)], "broken", 1, 0),
        ([ended(0, "deadline", 1)], "broken", 1, 0),
    ],
)
def test_the_first_that_failed_decides(workers, kind, status, worker):
    found = judge({one["worker"]: one for one in workers})
    assert (found.kind, found.status, found.worker) == (kind, status, worker)


ERROR = "ERROR: (gcloud.compute.tpus.tpu-vm.create) "


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (ERROR + "RESOURCE_EXHAUSTED: Quota limit 'V3' has been exceeded.", "quota"),
        (ERROR + "RESOURCE_EXHAUSTED: Too many requests", "busy"),
        (ERROR + "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "denied"),
        (ERROR + "PERMISSION_DENIED: Cloud TPU API has not been used in project 1",
         "denied"),
        (ERROR + "ALREADY_EXISTS: Resource 'a' already exists", "exists"),
        (ERROR + "NOT_FOUND: Resource 'a' was not found", "missing"),
        (ERROR + '{"code": 8, "message": "There is no more capacity"}', "capacity"),
        (ERROR + '{"code": 13, "message": "an internal error has occurred"}',
         "unavailable"),
        (ERROR + "HttpError accessing <U>: 503, UNAVAILABLE", "unavailable"),
        ("ERROR: gcloud crashed (ConnectionError): Max retries", "unavailable"),
        ("ERROR: There was a problem refreshing your current auth tokens: Max retries "
         "exceeded. Please run: $ gcloud auth login", "unavailable"),
        (ERROR + "You do not currently have an active account selected.", "login"),
        (ERROR + "INVALID_ARGUMENT: Invalid accelerator type 'v9-8'", "invalid"),
        ("timed out after 300 s", "unavailable"),
        ("something new", "other"),
    ],
)  # fmt: skip
def test_errors_are_known_by_their_words(said, kind):
    assert classify(said)[0] == kind


def test_only_what_may_pass_is_waited_for():
    assert not {"denied", "invalid", "login", "missing", "other"} & set(PASSING)
