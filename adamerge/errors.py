"""Every error that adamerge raises on purpose.

The command line prints the message of an ``AdamergeError`` without a traceback, so each message names what was
expected, what was found and what to do.
"""

from collections.abc import Iterable


class AdamergeError(Exception):
    """Base of all errors whose message is written for the user."""


class CheckpointError(AdamergeError):
    """A weight file is missing, truncated, unsafe or holds unusable values."""


class KeyMismatchError(AdamergeError):
    """An expert's keys, shapes or dtypes differ from the pretrained model's."""


class ShapeError(AdamergeError):
    """A tensor does not have the documented shape."""


class DataError(AdamergeError):
    """A data set is missing, empty, corrupt or disagrees with its class names."""


class ConfigError(AdamergeError):
    """An option is unknown, unset or in conflict with another."""


class TrainingError(AdamergeError):
    """Learning could not go on: a loss is not finite, or memory ran out."""


class OutputError(AdamergeError):
    """A result cannot be written where it should go."""


def shortlist(items: Iterable[object], limit: int = 5) -> str:
    """The first ``limit`` items in sorted order, comma-separated, followed by the count of what is left out."""
    names = sorted(str(item) for item in items)
    more = f", … {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
