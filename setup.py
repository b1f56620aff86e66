# SPDX-License-Identifier: Apache-2.0
"""How lm_scale is installed: `pip install -e ".[test]"`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: importing lm_scale needs what this file is about to install.
INIT = Path(__file__).with_name("lm_scale") / "__init__.py"
VERSION = re.search(r'^__version__ = "([^"]+)"$', INIT.read_text("utf-8"), re.MULTILINE)
if VERSION is None:
    raise ValueError(f'{INIT} must hold a line of the form: __version__ = "1.2.3"')

setup(
    name="lm_scale",
    version=VERSION.group(1),
    description="Pre-trains language models with JAX, from one laptop to a TPU pod",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lm_scale", "lm_scale.*"]),
    entry_points={"console_scripts": ["lm-scale = lm_scale.__main__:main"]},
    # Lower bounds only, each the oldest version that is tested. jax 0.10.2 is the last
    # for Python 3.11; pip takes newer ones on newer Pythons.
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "qwix>=0.1.8",
        "orbax-checkpoint>=0.12.8,<1",  # 1.0 replaces AsyncCheckpointer's API
        "grain>=0.2.18",
        "tensorstore>=0.1.80",
        "etils[epath]>=1.12",
        "transformers>=5",
        "datasets>=5",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "filelock>=3.16",  # for the limit of JAX's compilation cache
        "numpy>=2",
        "tyro>=1",
        "rich>=14",
        "tensorboardX>=2.6",
        "jaxtyping>=0.3",
    ],
    extras_require={
        "test": [
            "pytest>=9",
            "beartype>=0.20",
            "gguf>=0.19",
            "gcsfs>=2026",
            "gcp-storage-emulator>=2026",
            "kubernetes-validate>=1.37",
            "hypothesis>=6.100",
            "datatrove>=0.10",
            "matplotlib>=3.8",
        ],
        "gcs": ["gcsfs>=2026"],
        "datatrove": ["datatrove>=0.10"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # The compiler, and what draws a search's picture; no TPU is needed.
        "plan": ["jax[tpu]>=0.10.2", "matplotlib>=3.8"],
        "wandb": ["wandb>=0.20"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        "dev": ["ruff>=0.17,<0.18", "pyright>=1.1.400", "pre-commit>=4"],
    },
)
