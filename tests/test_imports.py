# SPDX-License-Identifier: Apache-2.0
"""The layout's promises, read from the source: who imports whom, who names the mesh."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lm_scale
from lm_scale.sharding import MESH_AXES

PACKAGE = Path(lm_scale.__file__).parent
# A module imports modules of the lines above its own only. `models.*` and `data.*`
# stand for what is not named itself. `lm_scale` is the package: version, no code.
ORDER = (
    (
        "lm_scale",
        "compile_cache",
        "console",
        "cpus",
        "errors",
        "hashing",
        "peaks",
        "splitmix",
    ),
    ("data.ahead", "xla_options"),
    ("wandb_run", "cluster", "changes", "manifest"),
    ("sharding", "objectives", "optim", "metrics", "distributed", "data", "lock"),
    ("checkpoint_folder", "replicas"),
    ("weight_files", "models.compute", "connect", "watchdog", "signals"),
    ("models.layout", "data.python_docs", "data.folders", "data.reading"),
    ("data.sources", "data.places", "data.ragged"),
    ("data.units", "data.arrays", "data.ranks"),
    ("data.corpus", "data.parts", "data.tokenizer", "data.encoding"),
    ("data.store", "data.texts", "data.waiting"),
    ("data.duplicates", "data.progress", "data.shards"),
    ("data.work", "data.stream"),
    (
        "losses",
        "models.product",
        "models.dropout",
        "models.scan",
        "data.windows",
        "data.order",
    ),
    ("models.layers",),
    ("data.packing", "data.token_cache", "data.where", "data.shown", "data.mixture"),
    ("data.examples", "data.share", "guard", "hub"),
    ("data.mixed", "models.vmem_kernels", "models.ring", "models.blockwise"),
    ("models.vmem",),
    ("models.kernels",),
    ("data.*", "models.attention", "models.rotary"),
    ("data.streamed",),
    ("models.*",),  # the families, which do not know one another
    ("models",),
    ("hf_tensors",),
    ("hf_shards", "warm_start"),
    ("hf", "generate", "step", "shapes"),
    ("checkpoint", "evaluate"),
    ("config",),
    ("run_json", "assemble"),
    ("first_weights",),
    ("run_text",),
    ("runs", "report", "start", "loop"),
    ("rollback",),
    ("trainer",),
    ("scripts.flags",),
    ("scripts.checks", "scripts.folder", "scripts.messages"),
    ("scripts.translate",),
    ("scripts.main",),
    ("show_batch",),
    ("planning", "planning.accelerators", "planning.hlo", "planning.kept"),
    (
        "planning.collectives",
        "planning.loops",
        "planning.moved",
        "planning.libtpu",
        "planning.gpus",
    ),
    ("planning.program", "planning.kernel_cycles"),
    ("planning.compile_step",),
    ("planning.activations",),
    ("planning.memory_model",),
    ("planning.time_model",),
    ("planning.plan",),
    ("planning.candidates", "planning.workers"),
    ("planning.search",),
    ("planning.report", "planning.compare"),
    ("planning.search_report",),
    ("planning.search_command",),
    ("planning.command",),
    ("commands", "checkpoint_command", "look", "prepare_step"),
    ("__main__",),
)


def name_of(path: Path) -> str:
    """`models.gpt2`; a folder's `__init__` is the folder; the root is `lm_scale`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "lm_scale"


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def level(module: str) -> int:
    for name in (module, module.rpartition(".")[0] + ".*"):
        for number, names in enumerate(ORDER):
            if name in names:
                return number
    pytest.fail(f"lm_scale.{module} is new: give it its place in ORDER, {__file__}")


def imports(tree: ast.Module) -> set[str]:
    """All that a file imports, also inside functions: `jax.sharding`, `models.gpt2`.

    Our own modules come without the package's name, as in ORDER.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: spell the package's name"
            for alias in node.names:  # `from lm_scale.models import gpt2, Compute`
                inner = f"{node.module}.{alias.name}"
                own = inner.removeprefix("lm_scale.") in SOURCES
                found.add(inner if own else node.module)
    return {name.removeprefix("lm_scale.") for name in found}


def own_imports(module: str) -> set[str]:
    return {name for name in imports(TREES[module]) if name in SOURCES}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_one_way(module):
    upward = {name for name in own_imports(module) if level(name) >= level(module)}
    assert not upward, f"lm_scale.{module} must not import {sorted(upward)}"


def test_the_reader_of_imports_sees_them():
    """What the test above relies on, with one import of each form."""
    assert {"sharding", "models.layers"} <= own_imports("models.gpt2")
    assert {"models", "models.layers"} <= own_imports("hf_tensors")
    assert "lm_scale" in own_imports("checkpoint")  # `from lm_scale import __version__`
    assert {"hf", "step", "data.loader"} <= own_imports("trainer")
    assert "trainer" in own_imports("__main__")  # inside functions


def reachable(module: str) -> set[str]:
    """The modules that importing one brings along."""
    found, open_ends = set(), {module}
    while open_ends:
        found |= open_ends
        open_ends = {name for m in open_ends for name in own_imports(m)} - found
    return found


KNOW_NO_MODEL = [
    name
    for name in SOURCES
    if name.startswith("data") or name in ("objectives", "optim", "metrics", "hub")
]


@pytest.mark.parametrize("module", KNOW_NO_MODEL)
def test_data_objectives_optimizers_and_metrics_know_no_model(module):
    allowed = (
        "errors", "sharding", "objectives", "optim", "metrics", "hub", "peaks",
        "wandb_run", "lm_scale", "console", "cpus", "splitmix",
        "lock", "manifest", "hashing",  # who prepares a store holds its lock
    )  # fmt: skip
    known = {name for name in reachable(module) if not name.startswith("data")}
    assert known <= set(allowed)


@pytest.mark.parametrize("module", [n for n in KNOW_NO_MODEL if n.startswith("data")])
def test_jax_is_imported_where_the_batch_becomes_a_global_array(module):
    libraries = {name.partition(".")[0] for name in imports(TREES[module])}
    makes_it = module in ("data.loader", "data.streamed")
    assert ("jax" in libraries) == makes_it
    assert "flax" not in libraries


def test_objectives_are_numpy():
    libraries = {name.partition(".")[0] for name in imports(TREES["objectives"])}
    assert not libraries & {"jax", "flax", "optax", "sharding"}


# --- Mesh axes ------------------------------------------------------------------------


def mesh_axis_spellings(tree: ast.Module) -> list[str]:
    """Where a file names a mesh axis: "fsdp", mesh.fsdp, MeshShape(fsdp=2).

    `data` and `context` are words of other things too: a folder `path / "data"`,
    `config.data`, `ts.open(context=...)`. So those two count as a string unless it is
    an operand of `/`, as an attribute of something called `mesh` or `shape`, and a
    keyword counts in a call of MeshShape alone.
    """
    folders = {
        id(node.right)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in MESH_AXES:
            if id(node) not in folders:
                found.append(f'line {node.lineno}: "{node.value}"')
        elif isinstance(node, ast.Attribute) and node.attr in MESH_AXES:
            owner = ast.unparse(node.value)
            if node.attr not in ("data", "context") or owner.endswith(
                ("mesh", "shape")
            ):
                found.append(f"line {node.lineno}: {owner}.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            "MeshShape"
        ):
            found += [f"line {node.lineno}: {k.arg}=" for k in node.keywords]
    return found


# In __main__, `data` is a command.
OTHERS = [name for name in SOURCES if name not in ("sharding", "__main__")]


@pytest.mark.parametrize("module", OTHERS)
def test_only_sharding_spells_a_mesh_axis(module):
    assert mesh_axis_spellings(TREES[module]) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ('PartitionSpec("data", None, ("fsdp", "tensor"))', 3),
        ("jax.lax.psum(x, 'data')", 1),
        ('mesh.shape["tensor"]', 1),
        ("mesh.data * config.mesh.context * sizes.fsdp", 3),
        ("MeshShape(data=1, fsdp=-1)", 2),
        ('str(Path(run_dir) / "data")', 0),
        ("config.data.corpus", 0),
        ("ts.open(spec, context=context)", 0),
        ('"""Shards the data axis."""', 0),
        ('rules.spec("batch", "seq")', 0),
    ],
)
def test_what_counts_as_a_spelling(code, count):
    assert len(mesh_axis_spellings(ast.parse(code))) == count


# --- What importing costs -------------------------------------------------------------


@pytest.mark.parametrize("module", ["lm_scale", "lm_scale.__main__"])
def test_importing_the_package_and_its_command_line_is_light(module):
    """jax must not be imported before the number of simulated devices is known."""
    heavy = ("jax", "flax", "transformers", "datasets", "tensorstore", "torch")
    code = f"import sys, {module}; print(*set({heavy!r}) & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
