# SPDX-License-Identifier: Apache-2.0
"""The one exception that a person, not a programmer, has to answer."""


class InputError(ValueError):
    """A file, a flag or a config value is wrong.

    The message is complete by itself: the offending value, what was expected and what
    to do. The command line prints it without a traceback and exits with status 2.
    """
