# SPDX-License-Identifier: Apache-2.0
"""The table of accelerators: names, topologies, what follows from published figures."""

import dataclasses

import pytest

from lm_scale.errors import InputError
from lm_scale.planning.accelerators import CUBES, GENERATIONS, SQUARES, find_slice
from lm_scale.planning.libtpu import topology_devices
from lm_scale.sharding import MeshShape, make_mesh


@pytest.mark.parametrize(
    ("name", "topology", "chips", "devices"),
    [
        ("v3-8", "v3:2x2", 4, 8),
        ("v3-32", "v3:4x4", 16, 32),
        ("v4-128", "v4:4x4x4", 64, 128),  # compiled without megacore
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5litepod-256", "v5e:16x16", 256, 256),
        ("V5P-64 ", "v5p:2x4x4", 32, 32),
        ("v6e-1", "v6e:1x1", 1, 1),
    ],
)
def test_a_name_tells_topology_and_devices(name, topology, chips, devices):
    found = find_slice(name)
    assert (found.topology, found.chips, found.devices) == (topology, chips, devices)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "v3-9",
            "none of 9. The number counts TensorCores, 2 a chip; of v3 there are 8,",
        ),
        ("v5e-512", "none of 512. The number counts chips; of v5e there are 1, 4, 8,"),
        ("h300-8", "'h300-8' is not known. Expected .* v3-8, .* h100-8"),
        ("v3", "'v3' is not known|there is none of 0"),
        ("", "'' is not known"),
    ],
)
def test_other_names_are_refused(name, said):
    with pytest.raises(InputError, match=said):
        find_slice(name)


def test_each_shape_has_as_many_chips_as_it_stands_for():
    for shapes in (SQUARES, CUBES):
        for chips, shape in shapes.items():
            sides = [int(n) for n in shape.split("x")]
            assert sides == sorted(sides) or shape.endswith("x1")
            product = 1
            for side in sides:
                product *= side
            assert product == chips


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v3-32", MeshShape(data=2, fsdp=4, tensor=4)),
        ("v4-64", MeshShape(data=4, fsdp=16)),  # its cores, one by one
        ("v5e-16", MeshShape(data=1, fsdp=8, tensor=2)),
        # Of a torus of 4 x 8 x 8, no whole axes of which make up 128 or 16.
        ("v5p-512", MeshShape(data=2, fsdp=128)),
        ("v5p-512", MeshShape(data=1, fsdp=16, tensor=16)),
    ],
)
def test_any_mesh_can_be_laid_on_a_slice(name, shape):
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is missing")
    devices = topology_devices(find_slice(name))
    mesh = make_mesh(shape, devices)
    assert mesh.devices.shape == dataclasses.astuple(shape)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)


def test_figures_of_a_device_are_shares_of_the_chip():
    v3, v5p, new = find_slice("v3-8"), find_slice("v5p-8"), find_slice("tpu7x-8")
    assert v3.generation.peak == 61.5e12 and v3.hbm == 16 * 2**30
    assert v3.hbm_bandwidth == 450e9
    assert v5p.generation.peak == 459e12 and v5p.ici_bandwidth == 600e9
    # Not published, or not at hand: unknown, not guessed.
    assert new.ici_bandwidth is None and new.generation.clock is None
    assert new.usable_hbm == new.hbm


def test_a_clock_does_the_peak_with_whole_matrix_units():
    for generation in GENERATIONS:
        if generation.clock is not None:
            units = generation.peak / generation.clock / (2 * 128 * 128)
            assert units == pytest.approx(round(units), rel=0.02), generation.name
            assert round(units) & (round(units) - 1) == 0  # a power of two
