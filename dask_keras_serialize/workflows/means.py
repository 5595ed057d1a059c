"""Means of weights: of sets of arrays, as ``model.get_weights()`` has them, here and on workers.

Sums are in double precision until the last step, however many tasks they are spread over, so that
the mean of float32 weights does not hang on how they were grouped. No array that is given is
written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import numpy.typing as npt

from dask_keras_serialize.errors import one_line
from dask_keras_serialize.wire.header import numpy_dtype

if TYPE_CHECKING:
    from distributed import Client

Weights = list[npt.NDArray[Any]]

#: How many sets of weights one task averages: of more, the means are averaged in turn.
FAN_IN = 16


def mean_weights(weights: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """Average sets of weights.

    Parameters
    ----------
    weights : sequence of list of ndarray
        Alike in their shapes and dtypes, as ``model.get_weights()`` returns them.
    shares : sequence of float
        How much each counts; of those that count nothing, nothing shows, not even a NaN.

    Returns
    -------
    list of ndarray
        New ones, of the same dtypes, by double precision. Those that are not floating (counts,
        tables) are the first set's that counts, themselves.
    """
    return _rounded(_exact(weights, shares), [np.asarray(each).dtype.name for each in weights[0]])


def mean_of(
    client: Client, trained: Sequence[Any], shares: Sequence[float], dtypes: Sequence[str]
) -> Any:
    """Average what workers trained, in as many steps as their number asks for.

    Parameters
    ----------
    client : distributed.Client
    trained : sequence of Future
        Of pairs: weights, and what there is to say of them.
    shares : sequence of float
    dtypes : sequence of str
        Of the weights, as Keras names them.

    Returns
    -------
    Future
        Of the mean, as of :func:`mean_weights`.
    """
    counted = [(each, share) for each, share in zip(trained, shares, strict=True) if share]
    # what counts nothing is not sent, but waited for, and it may fail
    after = [
        client.submit(logs_of, each, pure=False)
        for each, share in zip(trained, shares, strict=True)
        if not share
    ]
    while True:
        groups = [counted[i : i + FAN_IN] for i in range(0, len(counted), FAN_IN)]
        last = len(groups) == 1
        counted = [
            (
                client.submit(
                    _mean, [each for each, _ in group], [share for _, share in group],
                    dtypes if last else None, after, pure=False,
                ),
                sum(share for _, share in group),
            )
            for group in groups
        ]  # fmt: skip
        if last:
            return counted[0][0]
        after = []


def closed(logs: Any) -> bytes:
    """Pickle what ``train`` returned, in the task: workers wait forever for what cannot travel."""
    try:
        pickled: bytes = cloudpickle.dumps(logs)
    except Exception as error:  # pickling runs anybody's code
        raise TypeError(
            f"what train returned, a {type(logs).__name__}, cannot travel: return numbers or "
            f"arrays ({one_line(error)})"
        ) from error
    return pickled


def logs_of(trained: tuple[Weights, bytes]) -> bytes:
    """Return what there is to say of what was trained, pickled."""
    return trained[1]


def _mean(
    trained: Sequence[Any], shares: Sequence[float], dtypes: Sequence[str] | None, _after: Any
) -> Weights:
    # what was trained is a pair, a mean of some of it is not
    means = _exact([each[0] if isinstance(each, tuple) else each for each in trained], shares)
    return means if dtypes is None else _rounded(means, dtypes)


def _exact(weights: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """Average sets of weights, and leave what is floating in double precision."""
    counted = [(arrays, share) for arrays, share in zip(weights, shares, strict=True) if share]
    total = sum(share for _, share in counted)
    means = []
    for arrays in zip(*(arrays for arrays, _ in counted), strict=True):
        first = np.asarray(arrays[0])
        # bfloat16 and float8 are kinds of their own to numpy
        if first.dtype.kind not in "fc" and "float" not in first.dtype.name:
            means.append(first)
            continue
        summed = np.zeros(first.shape, "complex128" if first.dtype.kind == "c" else "float64")
        for array, (_, share) in zip(arrays, counted, strict=True):
            summed += np.asarray(array).astype(summed.dtype) * share
        summed /= total
        means.append(summed)
    return means


def _rounded(means: Weights, dtypes: Sequence[str]) -> Weights:
    """Give means the dtypes of what they are of; what is not averaged has its own."""
    return [
        mean.astype(numpy_dtype(dtype), copy=False) if mean.dtype.kind in "fc" else mean
        for mean, dtype in zip(means, dtypes, strict=True)
    ]
