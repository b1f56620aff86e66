# SPDX-License-Identifier: Apache-2.0
"""The error of launches that a person has to answer."""


class Refused(Exception):
    """What was asked for cannot be; the message says what was expected."""
