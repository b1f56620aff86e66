# SPDX-License-Identifier: Apache-2.0
"""The run-time type checker that conftest puts on lm_scale."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, too
