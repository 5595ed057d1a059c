"""What can go wrong, as exceptions a caller can tell apart.

Every message is one line that names the model or variable, what was wrong, and
the way out. All of them pickle, so that an error raised on a worker arrives whole
on the client.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Characters kept of the beginning and the end of a message: what others raise, and names
#: in bytes that lie, may have any number.
_HEAD, _TAIL = 700, 300


class KerasSerializeError(Exception):
    """Base of every error this package raises on purpose; its message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(message))


class EncodeError(KerasSerializeError, TypeError):
    """A model cannot be turned into bytes without losing something."""


class DecodeError(KerasSerializeError, ValueError):
    """Bytes cannot be turned back into the model they came from."""


class FormatError(DecodeError):
    """Bytes are in a wire format of another version of this package."""


class BusyError(EncodeError, DecodeError):
    """Neither can begin: another thread does not finish."""


class PlacementError(KerasSerializeError, RuntimeError):
    """A worker cannot be limited as asked."""


class UnreachableError(KerasSerializeError, OSError):
    """No scheduler answers."""


class MissingPackageError(KerasSerializeError, RuntimeError):
    """A worker of the cluster, or its scheduler, lacks this package."""

    @classmethod
    def on_workers(cls, addresses: Sequence[str], total: int) -> MissingPackageError:
        """Name the workers without the package, and the way out."""
        return cls(
            f"Keras models cannot be sent: the package dask-keras-serialize is not installed on "
            f"{len(addresses)} of {total} workers ({', '.join(addresses[:3])}): "
            "pip install dask-keras-serialize there and restart them"
        )

    @classmethod
    def on_scheduler(cls, address: str = "") -> MissingPackageError:
        """Name the scheduler without the package, and the way out."""
        return cls(
            "Keras models cannot be sent in task graphs: the package dask-keras-serialize is not "
            f"installed on the scheduler{f' ({address})' if address else ''}: pip install "
            "dask-keras-serialize there, without Keras, and restart it; or scatter the models, and "
            "send the futures"
        )


def one_line(error: BaseException) -> str:
    """Say what somebody else raised, in one line: its class, unless it is ours, and message."""
    ours = isinstance(error, KerasSerializeError)
    return _shortened(str(error) if ours else f"{type(error).__name__}: {error}")


def _shortened(message: str) -> str:
    # names that came with bytes: a terminal would obey what does not print
    line = "".join(each if each.isprintable() else "?" for each in " ".join(message.split()))
    whole = len(line) <= _HEAD + _TAIL
    return line if whole else f"{line[:_HEAD]} ... {line[-_TAIL:]}"
