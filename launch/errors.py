# SPDX-License-Identifier: Apache-2.0
"""The errors of launches that a person has to answer."""


class Refused(Exception):
    """What was asked for cannot be; the message says what was expected. Status 2."""


class Failed(Exception):
    """What another program could not do; the message says how it failed. Status 1."""
