"""dask-ml's adaptive searches on a dask that refuses them.

``HyperbandSearchCV`` and its kin run as a coroutine in the client's event loop, and call
``dask.persist`` there (``dask_ml/model_selection/_incremental.py``, ``_fit``). Since 2025.3.0
(dask/dask#11790) ``get_scheduler`` in ``dask/base.py`` refuses a client that is asked by its own
loop, because ``dask.compute`` could not wait for it; ``dask.persist`` does not wait, and is refused
with it (dask/dask-ml#1016). A scheduler that the config names is not looked at so closely, so here
it names one that goes on to the client.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _CurrentClient:
    """A scheduler for Dask's config: the client that dask would take without it."""

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        client = _client()
        if client.asynchronous:  # rightly refused: this one waits for the result
            raise RuntimeError(
                "dask.compute cannot wait for an asynchronous client: await client.compute(...)"
            )
        return client.get(dsk, keys, **kwargs)

    def persist(self, collections: Any, **kwargs: Any) -> Any:
        """Start computing collections; ``dask.persist`` asks for this by its name."""
        return _client().persist(collections, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # a nanny hands the config to its new worker, for which "scheduler: None" means its own
        return type(None), ()


_CURRENT = _CurrentClient()

_lock = threading.Lock()
#: The settings that are in force, the last one at the end, and how many blocks use each.
_settings: list[list[Any]] = []


@contextmanager
def adaptive_search() -> Iterator[None]:
    """Let dask-ml's adaptive searches run.

    ``HyperbandSearchCV``, ``SuccessiveHalvingSearchCV``, ``IncrementalSearchCV`` and
    ``InverseDecaySearchCV`` need it with dask 2025.3.0 and later; dask-ml's other searches and
    wrappers do not, and are the same within it.

    Raises
    ------
    RuntimeError
        If there is no client.

    Notes
    -----
    Sets ``scheduler`` in Dask's config, for all threads of this process, until the last of those
    blocks ends that run at the same time. What other code computes meanwhile goes to the same
    client as ever. Workers may join: none of it reaches them. A client that is made within it sets
    ``scheduler`` too: enter it when the client is there.

    Copies: none.

    Examples
    --------
    >>> with adaptive_search():  # doctest: +SKIP
    ...     search.fit(x, y, classes=range(10))
    """
    import dask

    try:
        _client()
    except ValueError:
        raise RuntimeError(
            "there is no Dask client, on which dask-ml searches: make one first, by Client()"
        ) from None
    with _lock:
        if not _settings or dask.config.get("scheduler", None) is not _CURRENT:
            _settings.append([dask.config.set(scheduler=_CURRENT), 0])
        mine = _settings[-1]
        mine[1] += 1
    try:
        yield
    finally:
        with _lock:
            mine[1] -= 1
            if not mine[1]:
                _settings.remove(mine)
                # else a client was closed meanwhile, or made, and has put back its own
                if dask.config.get("scheduler", None) is _CURRENT:
                    mine[0].__exit__(None, None, None)


def _client() -> Any:
    """Return the current client; in a task, that of its worker."""
    from distributed import get_client

    return get_client()
