"""Fine-tune a backbone of keras.applications on chunks of images, with Dask workers.

scikit-learn's handwritten digits, enlarged to 48 x 48 pixels in three colours, lie in chunks of a
dask.array. First the frozen backbone turns them into features, chunk by chunk, on all workers, and
a head is trained on those. Then the backbone's top is thawed, and the whole model trained on the
chunks by a worker, twice: the second task goes on with the optimizer that the first one left. Last,
all workers predict the chunks that were held out.

No weights can be had offline, so the backbone's are random, and the head makes do with what random
filters see. ``--weights imagenet`` downloads those that keras.applications has on offer; all
else is the same.

Exit status 1 if a model that came back is not, to the last bit, the one that the worker had.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

# before TensorFlow is imported, here and on the workers: it says much in every process
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.distributed import Client, Future, LocalCluster, as_completed

SIZE = 48
# all of a size, in batches of a size, each of which JAX would compile for
CHUNKS, CHUNK, BATCH = 11, 160, 32
HELD_OUT = 2  # chunks
CLASSES = 10


def enlarge(digits: np.ndarray) -> np.ndarray:
    """Make images in three colours in [-1, 1], as the backbone takes them, of 8 x 8 pixels."""
    larger = digits.reshape(-1, 8, 8).repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)
    return np.repeat(larger[..., np.newaxis] / 8 - 1, 3, axis=-1).astype("float32")


def load_chunks() -> tuple[da.Array, list[np.ndarray]]:
    """Return images in chunks, enlarged where they are used, and each chunk's labels."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))[: CHUNKS * CHUNK]
    images = da.from_array(digits[order], chunks=(CHUNK, -1)).map_blocks(
        enlarge, dtype="float32", drop_axis=1, new_axis=(1, 2, 3), chunks=(CHUNK, SIZE, SIZE, 3)
    )
    return images, np.split(labels[order], CHUNKS)


def build(weights: str | None) -> tuple[Any, Any, Any]:
    """Return a backbone, a head, and both of them as one model."""
    import keras

    keras.utils.set_random_seed(0)
    mobilenet = keras.applications.MobileNetV2(
        input_shape=(SIZE, SIZE, 3), alpha=0.35, include_top=False, weights=weights
    )
    # what comes after it sees ever less of images as small as these: 2 x 2 pixels, at last
    end = mobilenet.get_layer("block_4_expand_relu").output
    backbone = keras.Model(mobilenet.input, end, name="backbone")
    if weights is None:
        tell_the_scale(backbone)
    backbone.trainable = False
    layers = keras.layers
    head = keras.Sequential(
        [
            layers.Input(backbone.output_shape[1:]),
            layers.Flatten(),
            layers.LayerNormalization(),
            layers.Dense(CLASSES, activation="softmax"),
        ],
        name="head",
    )
    compile_for(head, rate=1e-3)
    inputs = layers.Input((SIZE, SIZE, 3))
    return backbone, head, keras.Model(inputs, head(backbone(inputs)), name="digits")


def tell_the_scale(backbone: Any) -> None:
    """Let random layers pass on what they see, which else fades away from one to the next."""
    import keras

    normalizing = [x for x in backbone.layers if isinstance(x, keras.layers.BatchNormalization)]
    before = [layer.momentum for layer in normalizing]
    for layer in normalizing:
        layer.momentum = 0.0  # what the layer sees now is what it takes for usual
    images, _ = load_chunks()
    backbone(images.blocks[-1].compute(), training=True)
    for layer, momentum in zip(normalizing, before, strict=True):
        layer.momentum = momentum


def compile_for(model: Any, rate: float) -> None:
    """Give a model an optimizer with a learning rate, and a loss."""
    import keras

    optimizer = keras.optimizers.Adam(rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])


def thaw(backbone: Any, layers: int) -> None:
    """Let the last layers be trained, but for what normalizes batches: those are small here."""
    import keras

    backbone.trainable = True
    for i, layer in enumerate(backbone.layers):
        normalizes = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = i >= len(backbone.layers) - layers and not normalizes


def predict(chunk: np.ndarray, model: Any) -> np.ndarray:
    """Run a model over one chunk; runs on a worker."""
    return model.predict(chunk, batch_size=BATCH, verbose=0)


def train(
    model: Any, chunks: list[np.ndarray], labels: list[np.ndarray], epochs: int
) -> tuple[Any, list[tuple[float, float]], str]:
    """Train on chunk after chunk; return the model, its curve and its token; runs on a worker."""
    curve = []
    for _ in range(epochs):
        for x, y in zip(chunks, labels, strict=True):
            history = model.fit(x, y, batch_size=BATCH, verbose=0).history
            curve.append((history["loss"][0], history["accuracy"][0]))
    return model, curve, tokenize(model)


class Trainer:
    """Has workers train and predict, and checks every model that comes back."""

    def __init__(self, client: Client, labels: list[np.ndarray]) -> None:
        self.client = client
        self.labels = labels
        self.different = 0

    def predict(self, chunks: list[Future], model: Any, what: str) -> list[Future]:
        """Run a model over chunks on all workers; print how many are done until all are."""
        futures = self.client.map(predict, chunks, model=model)
        for done, _ in enumerate(as_completed(futures), start=1):
            end = "\n" if done == len(futures) else ""
            if sys.stdout.isatty() or end:
                print(f"\r   {what}: {done}/{len(futures)} chunks", end=end, flush=True)
        return futures

    def train(
        self, model: Any, chunks: list[Future], epochs: int
    ) -> tuple[Any, list[tuple[float, float]]]:
        """Train a model on a worker, on all chunks but those held out."""
        print(f"   trained on {len(chunks) - HELD_OUT} chunks, {epochs} times", end="", flush=True)
        start = time.perf_counter()
        future = self.client.submit(
            train, model, chunks[HELD_OUT:], self.labels[HELD_OUT:], epochs, pure=False
        )
        model, curve, token = future.result()
        print(f": loss {curve[-1][0]:.3f}, {time.perf_counter() - start:.0f} s")
        # what dask calls a value by: a hash of all its bytes, the optimizer's too
        same = tokenize(model) == token
        self.different += not same
        print(f"   came back {'to the last bit' if same else 'DIFFERENT'}", end="")
        print(f", after {int(model.optimizer.iterations)} steps")
        return model, curve

    def score(self, model: Any, chunks: list[Future]) -> float:
        """Return the accuracy on the chunks held out."""
        futures = self.predict(chunks[:HELD_OUT], model, "held out")
        predicted = np.concatenate(self.client.gather(futures)).argmax(axis=1)
        share = float(np.mean(predicted == np.concatenate(self.labels[:HELD_OUT])))
        print(f"   right: {share:.1%}")
        return share


def draw(
    path: Path,
    head: list[tuple[float, float]],
    whole: list[tuple[float, float]],
    before: float,
    after: float,
) -> None:
    """Draw loss and accuracy, chunk by chunk, of the head alone and of the whole model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = {
        f"head alone: {before:.0%} of held-out digits right": (range(len(head)), head),
        f"backbone's top too: {after:.0%}": (range(len(head), len(head) + len(whole)), whole),
    }
    for i, (axes, title) in enumerate(zip(panels, ("loss", "accuracy"), strict=True)):
        for label, (steps, points) in curves.items():
            axes.plot(steps, [point[i] for point in points], label=label)
        axes.set(title=title, xlabel="chunks trained on", ylim=(0, None if i == 0 else 1))
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, loc="lower right")
    figure.suptitle("MobileNetV2 on handwritten digits, trained chunk by chunk on Dask workers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def run(client: Client, weights: str | None, epochs: int, output: Path) -> int:
    """Go through the stages; return how many models came back different."""
    images, labels = load_chunks()
    chunks = client.compute(images.to_delayed().ravel().tolist())
    backbone, head, whole = build(weights)
    print(f"{len(chunks)} chunks of {CHUNK} images, {HELD_OUT} of them held out")
    print(f"{len(backbone.layers)} layers of MobileNetV2, weights: {weights or 'random'}")
    trainer = Trainer(client, labels)

    print("\n1. The head alone, on what the frozen backbone makes of the images")
    features = trainer.predict(chunks, backbone, "features")
    trained, head_curve = trainer.train(head, features, epochs)
    before = trainer.score(trained, features)
    head.set_weights(trained.get_weights())  # the whole model's too, which holds the same head

    print("\n2. The backbone's top as well")
    thaw(backbone, layers=12)
    compile_for(whole, rate=3e-4)
    curve = []
    for _ in range(2):  # again with the same optimizer: it goes on where it was
        whole, more = trainer.train(whole, chunks, epochs)
        curve += more
    after = trainer.score(whole, chunks)

    path = output / "finetune.png"
    draw(path, head_curve, curve, before, after)
    print(f"\npicture: {path}")
    return trainer.different


def main() -> int:
    """Run the example; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", choices=["imagenet"], help="download these (default: random)")
    parser.add_argument("--epochs", type=int, default=2, help="of each of the three trainings")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for finetune.png (default: examples/output)",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        different = run(client, arguments.weights, arguments.epochs, arguments.output)
    print(f"{time.perf_counter() - start:.0f} s")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
