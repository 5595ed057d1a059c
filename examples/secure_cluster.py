"""A cluster for models of people you do not trust with code: TLS, and models by config alone.

Starts a scheduler and two workers that speak TLS and let in only who has their key; the workers
refuse everything that travels by value. Then a model trained on scikit-learn's digits goes out,
predicts on the workers and comes back; a model that holds code is refused there before any of it
runs; and a stranger without the key is not let in. Exit status 1 if any of that is otherwise.

Run ``python examples/secure_cluster.py``. docs/trust.md says what each of the two is for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# before TensorFlow is imported, here and in the workers started here
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from dask.distributed import Client, LocalCluster
from distributed.security import Security

from dask_keras_serialize import DecodeError

NO_CODE = {"DASK_DASK_KERAS_SERIALIZE__BY_VALUE": "False"}


def main() -> int:
    """Run the example."""
    images, labels = load_digits()
    model = build()
    model.fit(images, labels, epochs=5, verbose=0)
    expected = model.predict(images, verbose=0)
    # a key for this once; on many machines each is given the authority's certificate and its own
    security = Security.temporary()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, security=security, env=NO_CODE,
                     dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        address = client.scheduler.address
        print(f"scheduler at {address.rpartition(':')[0]}, {len(cluster.workers)} workers")
        future = client.scatter(model, broadcast=True)
        found = np.concatenate(
            client.gather(client.map(predict, np.array_split(images, 8), model=future))
        )
        there_and_back = np.array_equal(weights(client.gather(future)), weights(model))
        print(f"a model by its config: predicted {len(found)} digits, came back as it was")
        refusal = refused(client, images[:1], with_code())
        print(f"a model with code: {refusal}")
        stranger = let_in(address)
        print(f"a stranger without the key: {'let in' if stranger else 'not let in'}")
    fine = np.allclose(found, expected, atol=1e-5) and there_and_back
    return 0 if fine and "by-value forbids that" in refusal and not stranger else 1


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, 8 x 8 pixels in [0, 1], and what they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.data / 16).astype("float32"), digits.target


def build() -> Any:
    """Build a model of Keras's own layers, which travels by its config."""
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def with_code() -> Any:
    """Build a model that holds a function of somebody's own."""
    import keras

    return keras.Sequential([keras.Input((64,)), keras.layers.Lambda(lambda x: x + 1)])


def weights(model: Any) -> np.ndarray:
    """Return all of a model's weights, end to end."""
    return np.concatenate([each.ravel() for each in model.get_weights()])


def predict(chunk: np.ndarray, model: Any) -> np.ndarray:
    """Predict; runs on a worker."""
    return np.asarray(model.predict(chunk, verbose=0))


def refused(client: Client, images: np.ndarray, model: Any) -> str:
    """Have a worker predict with a model; return what the error says, if it is one."""
    try:
        client.submit(predict, images, model=client.scatter(model)).result()
    except DecodeError as error:
        return str(error)
    return "taken"


def let_in(address: str) -> bool:
    """Say whether a client with a key of its own making, or with none, gets to the scheduler."""
    without_tls = address.replace("tls://", "tcp://")
    for where, security in ((address, Security.temporary()), (without_tls, None)):
        try:
            with Client(where, security=security, timeout=5):
                return True
        except OSError:  # refused
            continue
    return False


if __name__ == "__main__":
    sys.exit(main())
