#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Masked-LM pre-training by the flags of transformers' old script of this name.

The same as `lm-scale mlm`; `--help` lists the flags, docs/migration.md what differs.
"""

import sys
from pathlib import Path

# A checkout, or a link to this file, needs no installed package, only what it imports.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm_scale.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["mlm", *sys.argv[1:]], script=sys.argv[0]))
