"""Worker plugin that checks for the package and registers it on every worker."""

from __future__ import annotations

from typing import Any

from distributed.diagnostics.plugin import WorkerPlugin

from dask_keras_serialize.registration import register
from dask_keras_serialize.wire.header import FORMAT


class RegisterKeras(WorkerPlugin):  # type: ignore[misc]
    """Register the package on every present and future worker.

    Not needed where it is installed and the config leaves registration on; use it
    to be told at once if a worker lacks the package, or with registration off.

    Examples
    --------
    >>> client.register_plugin(RegisterKeras())  # doctest: +SKIP
    """

    #: The same for all, so that a second one takes the place of the first.
    name = FORMAT

    def setup(self, worker: Any) -> None:
        """Register in the worker's process."""
        register()
