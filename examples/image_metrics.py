"""How good generated images are, as a small classifier sees them, and the sheets that show what is measured."""

import contextlib

import keras
import numpy as np
from matplotlib.figure import Figure
from prdc import compute_prdc
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors

from image_data import label_coverage, plot_images

SURE = 0.9  # the probability from which a classifier is called sure
NUM_COMPARED = 2000  # images, and twice as many real ones, of which precision and recall are
NUM_SHOWN = 100


def train_classifier(x, labels, seed=0, num_images=160_000):
    """Train a classifier of images (n, height, width, 1) into ten classes on so many of them, each in turn."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    classifier = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.RandomTranslation(1 / 16, 1 / 16, fill_mode="nearest"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(128, "relu", name="features"),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile(keras.optimizers.Adam(1e-3), loss)
    classifier.fit(x, labels, batch_size=64, epochs=-(-num_images // len(x)), verbose=0)
    return classifier


def classify(classifier, x):
    """The class of each image, and how sure the classifier is of it; of stacks, that of the least certain channel."""
    probabilities = softmax(_predict_channels(classifier, x), axis=-1)  # (channels, n, 10)
    labels = np.ravel_multi_index(tuple(probabilities.argmax(axis=-1)), (10,) * x.shape[-1])
    return labels, probabilities.max(axis=-1).min(axis=0)


def class_shares(labels, num_channels=1):
    """Shares (10,) of the classes of labels (n,); of stacks of independent channels (1000,), the products of theirs."""
    channels = np.unravel_index(labels, (10,) * num_channels)
    single = np.bincount(np.concatenate(channels), minlength=10) / (len(labels) * num_channels)
    shares = single
    for _ in range(num_channels - 1):
        shares = np.outer(shares, single).ravel()
    return shares


def measure(classifier, x, train, train_labels):
    """Measure images (n, height, width, channels) beside those that were trained on.

    Returns a dict: the ``divergence`` of their class shares q from p, sum q log (q / p), in nats; the share that the
    classifier is ``sure`` of; classes that are ``covered``; ``precision``, ``recall``, ``density`` and ``coverage``
    (arXiv:2002.09797) and the ``frechet`` distance, in the last hidden layer of the classifier; and the median
    ``distance`` of a pixel image to the nearest one that was trained on.
    """
    labels, confidence = classify(classifier, x)
    covered, divergence = label_coverage(labels, class_shares(train_labels, x.shape[-1]))
    net = keras.Model(classifier.inputs, classifier.get_layer("features").output)
    compared = train[: 2 * NUM_COMPARED], x[:NUM_COMPARED]
    real, found = (np.concatenate(_predict_channels(net, each), axis=1) for each in compared)
    with contextlib.redirect_stdout(None):  # it prints the numbers of images
        neighbours = compute_prdc(real, found, nearest_k=5)
    distances = NearestNeighbors(n_neighbors=1).fit(_flatten(train)).kneighbors(_flatten(x[:NUM_COMPARED]))[0]
    return {
        "divergence": divergence,
        "sure": float((confidence >= SURE).mean()),
        "covered": covered,
        **{name: float(number) for name, number in neighbours.items()},
        "frechet": frechet_distance(real, found),
        "distance": float(np.median(distances)),
    }


def frechet_distance(x, y):
    """Fréchet distance of the Gaussians with mean and covariance of features x (n, d) and y (m, d)."""
    difference, a, b = x.mean(axis=0) - y.mean(axis=0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0))
    return float(difference @ difference + np.trace(a + b) - 2 * roots.sum())


def draw_sheet(pools, shares):
    """Draw the first 100 images of each pool, a dict by title, side by side; below, the shares of its ten classes."""
    figure = Figure(figsize=(4 * len(pools), 4.8), layout="none")
    margins = {"left": 0.005, "right": 0.995, "bottom": 0.11, "top": 0.94, "wspace": 0.03}
    panels = figure.subplots(1, len(pools), gridspec_kw=margins)
    for ax, (title, x), of_pool in zip(panels, pools.items(), shares, strict=True):
        plot_images(ax, x[:NUM_SHOWN])
        ax.set_title(title)
        lines = ["  ".join(f"{i}: {of_pool[i]:.1%}" for i in part) for part in (range(5), range(5, 10))]
        below = {"transform": ax.transAxes, "ha": "center", "va": "top", "fontsize": 8}
        ax.text(0.5, -0.01, "\n".join([f"of {len(x):,}:", *lines]), **below)
    return figure


def _flatten(x):
    return x.reshape(len(x), -1)


def _predict_channels(net, x):
    """Outputs (channels, n, units) of a network of images with one channel, for each channel of x."""
    return np.stack([net.predict(x[..., [c]], batch_size=1000, verbose=0) for c in range(x.shape[-1])])
