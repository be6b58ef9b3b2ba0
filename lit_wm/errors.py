"""Errors that a user can cause and fix; the command line prints them without a traceback.

A message says what is wrong and where, what was expected, and what to do.
"""

from __future__ import annotations

from operator import index
from typing import Any


class LitWMError(Exception):
    """Any error that the user can fix."""


class EnvError(LitWMError, ValueError):
    """An environment that is unknown, cannot be built or has a space this project does not take."""


class DataError(LitWMError, ValueError):
    """A dataset or a replay that is broken, does not fit or disagrees with the model."""


class ConfigError(LitWMError, ValueError):
    """A configuration with an unknown or impossible value."""


class CheckpointError(LitWMError, ValueError):
    """A checkpoint that is broken or belongs to something else."""


class NotSupported(LitWMError, NotImplementedError):
    """A verb that this object does not have, e.g. the snapshot of an unknown simulator."""


class Interrupted(LitWMError):
    """Ctrl-C or SIGTERM ended a training or an evaluation before its end; ``number`` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of Python or NumPy as an int. Raises ConfigError if it is none of ``least`` or more."""
    try:
        number = least - 1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of {least} or more")
    return number


def nearest(name: str, known: list[str], count: int = 3) -> str:
    """The part of a message that names the closest ``known`` words: ``"; did you mean 'a' or 'b'?"``."""
    from difflib import get_close_matches
    from os.path import splitext

    if name in known:  # something else is wrong
        return ""
    ending = splitext(name)[1]  # in common with other files it makes none of them alike
    ending = ending if any(k.endswith(ending) for k in known) else ""
    full = {k.removesuffix(ending): k for k in known}
    close = get_close_matches(name.removesuffix(ending), list(full), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(full[k]) for k in close)}?" if close else ""
