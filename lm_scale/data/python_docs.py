# SPDX-License-Identifier: Apache-2.0
"""The builtin corpus: the English that ships with every CPython. No network."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Folders of the standard library that hold tests, programs or other people's packages.
_NOT_STDLIB = {
    "__pycache__",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}


def python_docs() -> Iterator[str]:
    """Reference-manual sections by name, then the docstrings of each stdlib file."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    for folder, subfolders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = sorted(set(subfolders) - _NOT_STDLIB)
        for name in sorted(files):
            if name.endswith(".py"):
                text = "\n\n".join(_docstrings(Path(folder, name)))
                # A docstring may hold lone surrogates, which UTF-8 cannot.
                yield text.encode(errors="replace").decode()


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a Python file in the order of its lines."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]
