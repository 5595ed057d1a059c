"""Clean noisy photographs, tile by tile, on Dask workers: a Keras model over a dask.array.

A small convolutional network learns here to take noise off tiles of one of scikit-learn's two
sample images. Then both images, cut into overlapping tiles, are one lazy dask.array, and
``predict`` another: its shape and dtype are known before anything is computed, the model crosses
once to each of two worker processes. The result is compared bit by bit with what
``model.predict`` gives in this process. Exit status 1 if anything differs.

Run ``python examples/predict.py``, or add ``--scheduler tcp://host:8786`` for a cluster that runs
already.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

# sets what makes sums equal, before TensorFlow is imported; what it prints is the same here
from demo import Report, connect  # isort: skip

import dask
import dask.array as da
import numpy as np
from dask.distributed import futures_of

from dask_keras_serialize.workflows.inference import predict

#: Pixels that a tile gives, and that the network sees of its neighbours on each side.
TILE, SEEN = 32, 4
NOISE = 0.12
BATCH = 8


def load_images() -> np.ndarray:
    """Return the two images, of shape (2, 416, 640, 3), in [0, 1]."""
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images)
    height, width = (size - size % TILE for size in images.shape[1:3])
    return (images[:, :height, :width] / 255).astype("float32")


def add_noise(images: np.ndarray, seed: int) -> np.ndarray:
    """Return noisy copies."""
    noise = np.random.default_rng(seed).normal(0, NOISE, images.shape)
    return (images + noise).astype("float32")


def tiles_of(images: np.ndarray) -> np.ndarray:
    """Cut images into tiles with what is seen around them: (tiles, 40, 40, 3), a copy."""
    side = TILE + 2 * SEEN
    padded = np.pad(images, ((0, 0), (SEEN, SEEN), (SEEN, SEEN), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
    return np.moveaxis(windows[:, ::TILE, ::TILE], 3, -1).reshape(-1, side, side, 3)


def lazy_tiles(shape: tuple[int, ...]) -> da.Array:
    """Return the noisy tiles, a chunk for each row of an image; workers make them."""
    count, height, width, colors = shape
    across, side = width // TILE, TILE + 2 * SEEN
    row = dask.delayed(noisy_row)
    return da.concatenate(
        [
            da.from_delayed(row(image, top, across), (across, side, side, colors), "float32")
            for image in range(count)
            for top in range(height // TILE)
        ]
    )


def noisy_row(image: int, row: int, across: int) -> np.ndarray:
    """Load an image, and return a row of its tiles; runs on a worker."""
    tiles = tiles_of(add_noise(load_images(), seed=0)[image : image + 1])
    return tiles[row * across : (row + 1) * across]


def joined(tiles: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Put tiles of 32 x 32 together again."""
    count, height, width, colors = shape
    grid = tiles.reshape(count, height // TILE, width // TILE, TILE, TILE, colors)
    return grid.swapaxes(2, 3).reshape(shape)


def build_model() -> Any:
    """Build a network that says what of a tile's middle is noise, and takes it off."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    tile = keras.Input((TILE + 2 * SEEN, TILE + 2 * SEEN, 3))
    x = tile
    for _ in range(SEEN - 1):
        x = layers.Conv2D(24, 3, activation="relu")(x)
    noise = layers.Conv2D(3, 3, kernel_initializer="zeros")(x)
    clean = layers.Cropping2D(SEEN)(tile) - noise
    return keras.Model(tile, clean, name="cleaner")


def train(model: Any, image: np.ndarray, epochs: int) -> float:
    """Train on one image, with other noise in each epoch; return the last loss."""
    import keras

    model.compile(keras.optimizers.Adam(2e-3), "mse")
    middle = slice(SEEN, -SEEN)
    right = tiles_of(image)[:, middle, middle]
    for epoch in range(epochs):
        noisy = tiles_of(add_noise(image, seed=1 + epoch))
        loss = model.fit(noisy, right, batch_size=20, verbose=0).history["loss"][0]
    return float(loss)


def decibels(images: np.ndarray, right: np.ndarray) -> float:
    """Return the ratio of peak signal to noise."""
    return float(-10 * np.log10(np.mean((images - right) ** 2)))


def draw(path: Path, noisy: np.ndarray, clean: np.ndarray, right: np.ndarray) -> None:
    """Draw the images before and after, and a part of each enlarged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, 4, figsize=(14, 5.4), layout="constrained")
    part = slice(120, 216), slice(250, 394)
    for axes, before, after, true in zip(rows, noisy, clean, right, strict=True):
        titles = (
            f"noisy, {decibels(before, true):.1f} dB",
            f"clean, {decibels(after, true):.1f} dB",
        )
        shown = (before, after, before[part], after[part])
        for ax, image, title in zip(axes, shown, (*titles, "", ""), strict=True):
            ax.imshow(np.clip(image, 0, 1))
            ax.set_title(title, fontsize=13)
            ax.set(xticks=[], yticks=[])
    figure.suptitle("scikit-learn's sample images, cleaned in tiles by Dask workers", fontsize=15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the example; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scheduler", metavar="ADDRESS", help="use the cluster of this scheduler")
    parser.add_argument("--epochs", type=int, default=4, help="of the training")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for predict.png (default: examples/output)",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    report = Report(steps=4)
    with contextlib.ExitStack() as stack:
        with report.step("Connect to " + (arguments.scheduler or "two worker processes")):
            client = connect(arguments.scheduler, stack)
            report.say(f"workers: {len(client.scheduler_info(n_workers=-1)['workers'])}")
        with report.step("Train here, on tiles of one of scikit-learn's images"):
            right = load_images()
            noisy = add_noise(right, seed=0)
            model = build_model()
            loss = train(model, right[:1], arguments.epochs)
            report.say(f"{model.count_params():,} parameters, loss {loss:.5f}")
        with report.step("Predict over a dask.array of the tiles of both"):
            lazy = predict(model, lazy_tiles(right.shape), batch_size=BATCH)
            report.say(f"known beforehand: shape {lazy.shape}, {lazy.dtype}, in {lazy.npartitions}")
            persisted = lazy.persist()
            report.watch(futures_of(persisted))
            found = persisted.compute()
            chunks = np.split(tiles_of(noisy), lazy.npartitions)
            here = [model.predict(chunk, batch_size=BATCH, verbose=0) for chunk in chunks]
            report.compare("predictions", [found], [np.concatenate(here)])
    with report.step("Draw"):
        clean = joined(found, right.shape)
        before, after = decibels(noisy, right), decibels(clean, right)
        report.say(f"signal to noise: {before:.1f} dB before, {after:.1f} dB after")
        path = arguments.output / "predict.png"
        draw(path, noisy, clean, right)
        report.say(f"picture: {path}")
    took = f"{time.perf_counter() - start:.0f} s"
    if report.different:
        print(f"\nThe predictions DIFFER ({took})")
        return 1
    print(f"\nThe predictions are bit-equal ({took})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
