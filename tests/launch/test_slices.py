# SPDX-License-Identifier: Apache-2.0
"""launch/slices.py: names, VMs, chips and devices of TPU slices."""

import pytest

from launch.errors import Refused
from launch.slices import GENERATIONS, find


@pytest.mark.parametrize(
    ("name", "accelerator", "hosts", "chips", "devices", "on_each"),
    [  # as Cloud TPU's documentation has them
        ("v2-8", "v2-8", 1, 4, 8, 8),
        ("v3-8", "v3-8", 1, 4, 8, 8),
        ("v3-32", "v3-32", 4, 16, 32, 8),
        ("V3-2048", "v3-2048", 256, 1024, 2048, 8),
        ("v4-8", "v4-8", 1, 4, 4, 4),
        ("v4-32", "v4-32", 4, 16, 16, 4),
        ("v5e-1", "v5litepod-1", 1, 1, 1, 1),
        ("v5litepod-8", "v5litepod-8", 1, 8, 8, 8),
        ("v5e-16", "v5litepod-16", 4, 16, 16, 4),
        ("v5p-8", "v5p-8", 1, 4, 4, 4),
        ("v5p-12288", "v5p-12288", 1536, 6144, 6144, 4),
        ("v6e-4", "v6e-4", 1, 4, 4, 4),
        ("v6e-256", "v6e-256", 64, 256, 256, 4),
    ],
)
def test_slices(name, accelerator, hosts, chips, devices, on_each):
    found = find(name)
    assert (found.name, found.hosts, found.chips) == (accelerator, hosts, chips)
    assert (found.devices, found.devices_per_host) == (devices, on_each)


def test_every_size_is_whole_vms():
    for generation in GENERATIONS:
        for size in generation.sizes:
            found = find(f"{generation.name}-{size}")
            assert found.hosts * found.chips_per_host == found.chips > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v3-9", "there is none of 9.*8, 32, 128"),
        ("v3-16", "there is none of 16"),
        ("v5e-2", "counts chips"),
        ("v7-8", "Kubernetes"),
        ("tpu7x-16", "Kubernetes Engine .*tpu7x-standard-4t"),
        ("v9-8", "no TPU v9; expected one of v2, v3, v4, v5e, v5p, v6e"),
        ("a100", "expected a TPU type and a size: v2-"),
        ("v3-8 --spot", "expected a TPU type"),
        ("", "expected a TPU type"),
    ],
)
def test_what_does_not_exist_is_refused(name, said):
    with pytest.raises(Refused, match=said):
        find(name)
