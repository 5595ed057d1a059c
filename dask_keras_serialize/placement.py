"""Worker plugin that says how much of its machine a worker takes, before its backend starts.

Backends take what they find: TensorFlow and JAX most of a GPU's memory at once, all of them a
thread for every core in each process. So workers that share a GPU or a host have to be told,
before the first model arrives. As ``dask worker --preload dask_keras_serialize.placement`` it takes
its arguments from the command line and from Dask's config, ``dask-keras-serialize.placement``.
"""

from __future__ import annotations

import asyncio
import copy
import os
import sys
import threading
from typing import Any, Literal

import click
from dask import config
from distributed.diagnostics import nvml
from distributed.diagnostics.plugin import WorkerPlugin

from dask_keras_serialize import devices
from dask_keras_serialize.backends import NAMES
from dask_keras_serialize.errors import PlacementError
from dask_keras_serialize.wire import cuda
from dask_keras_serialize.wire.header import FORMAT

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class PlaceKeras(WorkerPlugin):  # type: ignore[misc]
    """Limit every present and future worker to a device, and to a part of it.

    Parameters
    ----------
    backend : {"tensorflow", "jax", "torch"}, optional
        That Keras has to run on there; chosen where Keras is not loaded yet.
    device : int, "gpu", "cpu" or dict, optional
        Which of the GPUs in ``CUDA_VISIBLE_DEVICES``, by its place there: dask-cuda sets that for
        each worker, its own first. ``"gpu"`` is the first; by default a worker has all of them. Or
        one for each worker's name: ``{0: 0, 1: 1}`` for a LocalCluster of two.
    memory : "growth", int, str or float, optional
        Of the GPU: taken as it is needed; or at most that many bytes (``"4 GiB"``), or that part
        of the card's (``0.25``). TensorFlow and JAX take a limit at once, torch as it is needed.
    threads : "worker" or int, optional
        Cores for all tasks of a worker together; ``"worker"`` for as many as it has threads.
        None leaves it to the backend: one for each core of the machine, in each worker.
    policy : str, optional
        Dtype policy of models that tasks make, such as ``"mixed_bfloat16"``, on every thread. A
        model that arrives keeps its own.

    Raises
    ------
    ValueError
        If an argument makes no sense anywhere.
    PlacementError
        By ``client.register_plugin``: names the worker that cannot do so, and why. The scheduler
        keeps the plugin all the same, until it is given another or
        ``client.unregister_worker_plugin(PlaceKeras.name)``: a worker that joins later, or is
        restarted, and cannot is closed, with a warning on the client.

    Examples
    --------
    >>> client.register_plugin(PlaceKeras(memory="growth"))  # doctest: +SKIP
    """

    #: The same for all, so that a worker has one.
    name = f"{FORMAT} placement"

    def __init__(
        self,
        *,
        backend: str | None = None,
        device: int | str | dict[Any, int | str | None] | None = None,
        memory: str | float | None = None,
        threads: int | Literal["worker"] | None = "worker",
        policy: str | None = None,
    ) -> None:
        if backend is not None and backend not in NAMES:
            raise ValueError(f"backend={backend!r} is none of {', '.join(NAMES)}")
        if device == {}:
            raise ValueError("device={} names no worker")
        for each in device.values() if isinstance(device, dict) else [device]:
            if not (
                each in (None, "gpu", "cpu") or (devices.is_number(each, int) and int(each) >= 0)
            ):
                raise ValueError(f"device={each!r} is no number of a GPU from 0, 'gpu' or 'cpu'")
        if device == "cpu" and memory is not None:
            raise ValueError(f"memory={memory!r} is the GPU's, and device='cpu' forbids it")
        if not (
            threads in (None, "worker") or (devices.is_number(threads, int) and int(threads) > 0)
        ):
            raise ValueError(f"threads={threads!r} is no number of cores from 1, or 'worker'")
        if policy is not None and not isinstance(policy, str):
            raise ValueError(f"policy={policy!r} is no name of a dtype policy")
        if policy is not None and "keras" in sys.modules:
            sys.modules["keras"].dtype_policies.get(policy)  # ValueError if there is none such
        self.backend = backend
        self.device: Any = device
        self.memory = devices.memory_limit(memory)
        self.threads = threads
        self.policy = policy

    async def setup(self, worker: Any) -> None:
        """Set it all in the worker's process; on another thread, for loading a backend takes long.

        Raises
        ------
        PlacementError
            If it cannot be done there, or any more.
        """
        try:
            mine = self._for(worker.name)
            nthreads = worker.state.nthreads
            await asyncio.to_thread(mine._place, nthreads)
            limits = devices.Limits(threads=mine._cores(nthreads), tasks=nthreads)
            await devices.settle_threads(worker.executors["default"], limits)
        except (PlacementError, devices.StartedError) as error:
            cannot = PlacementError(f"worker {worker.address} ({worker.name!r}): {error}")
            if _joins():
                _turn_away(worker, cannot)
            raise cannot from None

    def _for(self, name: Any) -> PlaceKeras:
        """Return what is asked of the worker of a name."""
        mine = copy.copy(self)
        if isinstance(self.device, dict):
            named = {str(each): device for each, device in self.device.items()}
            if str(name) not in named:
                raise PlacementError(f"device={self.device} says nothing of a worker of this name")
            mine.device = named[str(name)]
            mine.memory = None if mine.device == "cpu" else self.memory
        return mine

    def _place(self, nthreads: int) -> None:
        global _placed
        with _LOCK:
            mine = vars(self) | {"threads": self._cores(nthreads)}
            if _placed is None:
                before = os.environ.get(_VISIBLE)
                try:
                    self._settle(nthreads, before)
                except PlacementError:
                    _set(before)
                    raise
                _placed = mine
            elif _placed != mine:
                changed = ", ".join(
                    f"{name}={_placed[name]!r}, now {mine[name]!r}"
                    for name in mine
                    if mine[name] != _placed[name]
                )
                raise PlacementError(f"it was placed otherwise before: {changed}; {_RESTART}")

    def _settle(self, nthreads: int, before: str | None) -> None:
        with_keras = "keras" in sys.modules
        visible = self._visible(before)
        if not with_keras:
            if self.backend is not None:
                os.environ["KERAS_BACKEND"] = self.backend
            _set(visible)
        try:
            import keras

            backend = devices.current()
        except ImportError as error:
            raise PlacementError(f"Keras cannot be loaded ({error}): install it there") from error
        here = keras.backend.backend()
        if self.backend not in (None, here):
            raise PlacementError(
                f"Keras runs on {here!r} there, not on {self.backend!r}: set KERAS_BACKEND before "
                "the worker starts"
            )
        if with_keras and visible != before:
            if not backend.started():
                _set(visible)
            elif backend.gpus():  # with none, there is nothing to forbid or to choose from
                raise PlacementError(_RESTART)
        try:
            backend.settle(self._limits(nthreads))
        except devices.StartedError as error:
            raise PlacementError(f"{_RESTART} ({error})") from error
        chosen = self.device not in (None, "cpu")
        if (chosen or isinstance(self.memory, (int, float))) and not backend.gpus():
            asked = f"device={self.device!r}" if chosen else f"memory={self.memory!r}"
            raise PlacementError(
                f"{asked} is asked for, and Keras on {here!r} finds no GPU there "
                f"({_VISIBLE} was {before!r}): install its GPU build, or use device='cpu'"
            )
        shown = devices.driver_gpus() if chosen else 1
        if shown is not None and shown > 1:  # somebody has asked the driver before us
            raise PlacementError(f"{_RESTART} (CUDA shows it {shown} GPUs, not the one)")
        if self.policy is not None:
            from dask_keras_serialize.configs import defaults

            try:
                policy = keras.dtype_policies.get(self.policy)
            except (ValueError, TypeError) as error:
                raise PlacementError(f"policy={self.policy!r} is none there: {error}") from error
            if not defaults.set_policy_everywhere(policy):
                raise PlacementError(
                    f"keras {keras.version()} keeps its policy in a way that is not known: set it "
                    "in every task, by keras.config.set_dtype_policy()"
                )

    def _cores(self, nthreads: int) -> int | None:
        return nthreads if self.threads == "worker" else self.threads

    def _visible(self, now: str | None) -> str | None:
        """Return what CUDA_VISIBLE_DEVICES has to be; None for all GPUs."""
        if self.device == "cpu":
            return "-1"
        if self.device is None:
            return now
        place = 0 if self.device == "gpu" else int(self.device)
        if now is None:
            count = nvml.device_get_count()  # 0 without NVML's Python package
            names = list(map(str, range(count or place + 1)))
        else:
            names = [name for name in now.split(",") if name.strip() not in ("", "-1")]
        if place >= len(names):
            raise PlacementError(
                f"device={self.device!r} is asked for, and {len(names)} GPUs are there "
                f"({_VISIBLE} is {now!r}): choose another, or use device='cpu'"
            )
        return names[place].strip()

    def _limits(self, nthreads: int) -> devices.Limits:
        nbytes = self.memory if isinstance(self.memory, int) else None
        fraction = self.memory if isinstance(self.memory, float) else None
        if nbytes is not None or fraction is not None:
            whole = _card_bytes()
            if nbytes is not None and nbytes > whole:
                raise PlacementError(
                    f"memory={nbytes} bytes is more than its GPU's {whole}: ask for less"
                )
            nbytes = nbytes or int(whole * (fraction or 0))
            fraction = nbytes / whole
        return devices.Limits(
            cpu=self.device == "cpu",
            growth=self.memory == "growth",
            nbytes=nbytes,
            fraction=fraction,
            threads=self._cores(nthreads),
            tasks=nthreads,
        )


#: One process may hold several workers, which share its backend.
_LOCK = threading.Lock()

#: How this process was placed.
_placed: dict[str, Any] | None = None


def forbids_gpus() -> bool:
    """Say whether this process may use no GPU: it was placed so, or is shown none."""
    return cuda.hidden() or (_placed is not None and _placed["device"] == "cpu")


_RESTART = (
    "its backend has started its devices: place workers before they get a model, or restart them, "
    "as client.restart() does those that have a nanny"
)


def _joins() -> bool:
    """Say whether a worker is just joining: its plugins are then asked in tasks of their own.

    distributed goes on whatever they raise (``Worker._register_with_scheduler``).
    """
    task = asyncio.current_task()
    coroutine = None if task is None else task.get_coro()
    return getattr(coroutine, "__qualname__", "") == "Worker.plugin_add"


def _turn_away(worker: Any, error: PlacementError) -> None:
    """Close a worker, and let clients know: without limits it could take all of a GPU."""
    worker.log_event("warn", f"{error}; it is closed")  # a topic that clients warn of
    worker.loop.add_callback(worker.close, reason=f"{FORMAT} placement")


def _set(visible: str | None) -> None:
    # as NVML counts, by which they were chosen; CUDA's own order is by speed
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if visible is None:
        os.environ.pop(_VISIBLE, None)
    else:
        os.environ[_VISIBLE] = visible


def _card_bytes() -> int:
    """Return the memory of the GPU that this process sees first, in bytes."""
    try:
        return int(nvml.one_time()["memory-total"])
    except Exception as error:  # NVML's own, or none of its package
        raise PlacementError(
            f"how much memory its GPU has is not known ({error!r}): pip install nvidia-ml-py "
            "there, or use memory='growth'"
        ) from error


def _number(value: Any) -> Any:
    """Return a number of the command line as one."""
    for kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            continue
    return value


@click.command()
@click.option("--backend")
@click.option("--device")
@click.option("--memory")
@click.option("--threads")
@click.option("--policy")
async def dask_setup(worker: Any, **arguments: str | None) -> None:
    """Place a worker as it starts: what ``dask worker --preload`` runs.

    Raises
    ------
    SystemExit
        Says what it cannot be limited to. The worker then does not start: of any other exception
        Dask writes into the log, and goes on (``distributed/preloading.py``).
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    settings = dict(config.get(f"{FORMAT}.placement", None) or {}) | given
    try:
        plugin = PlaceKeras(**{name: _number(value) for name, value in settings.items()})
        await worker.plugin_add(plugin=plugin, name=plugin.name, catch_errors=False)
    except (PlacementError, ValueError, TypeError) as error:
        raise SystemExit(f"{FORMAT}: {error}") from error
