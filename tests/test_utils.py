import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from utils import DATASETS, distances_to_modes, noisy_density_2d, sample_2d_data

# Written out again, so that a slip in the module's constants shows.
BLUR = {"8gaussians": 0.5 / 2**0.5, "2spirals": 0.1, "checkerboard": 0.0, "rings": 0.08}
REACH = {"8gaussians": 4 / 2**0.5, "2spirals": 3 * np.pi / 3 + 0.25, "checkerboard": 4.0, "rings": 3.0}
DARK_SQUARES = [(-4, -4), (-4, 0), (-2, -2), (-2, 2), (0, -4), (0, 0), (2, -2), (2, 2)]  # lower left corners
RADII = np.array([3, 2.25, 1.5, 0.75])
CENTRES = 4 / 2**0.5 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)


def grid(axis):
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


# --- Samples ---


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("n_samples", [1, 2, 7, 1001, np.int64(5)])
def test_samples_have_the_shape_asked_for(dataset, n_samples):
    samples = sample_2d_data(dataset, n_samples, rng=0)
    assert samples.shape == (n_samples, 2)
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("dataset", DATASETS)
def test_samples_depend_on_rng_alone(dataset):
    samples = sample_2d_data(dataset, 50, rng=3)
    np.testing.assert_array_equal(samples, sample_2d_data(dataset, 50, rng=3))
    generator = np.random.default_rng(3)
    np.testing.assert_array_equal(samples, sample_2d_data(dataset, 50, rng=generator))
    assert not np.isin(sample_2d_data(dataset, 50, rng=generator), samples).any()  # the generator moved on
    assert not np.isin(sample_2d_data(dataset, 50, rng=4), samples).any()
    assert not np.isin(sample_2d_data(dataset, 50), sample_2d_data(dataset, 50)).any()


@pytest.mark.parametrize("dataset", DATASETS)
def test_rows_are_independent_and_identically_distributed(dataset):
    samples = sample_2d_data(dataset, 40_001, rng=11)[:40_000]
    column, row = np.clip(np.floor(samples / 2), -2, 1).astype(int).T + 2
    cells = 4 * column + row  # which of 4 x 4 squares of side 2

    index = np.arange(len(cells))
    for labels, others in (
        (index < len(cells) // 2, cells),  # arms one after the other would fail
        (index % 2, cells),
        (index % 8, cells),
        (cells[:-1:2], cells[1::2]),  # a row says nothing about the next one
    ):
        table = stats.contingency.crosstab(labels, others).count
        assert stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue > 1e-3


@pytest.mark.parametrize("dataset", DATASETS)
def test_single_samples_come_from_the_whole_distribution(dataset):
    singles = np.concatenate([sample_2d_data(dataset, 1, rng=seed) for seed in range(1000)])
    together = sample_2d_data(dataset, 20_000, rng=0)
    for axis in range(2):
        assert stats.ks_2samp(singles[:, axis], together[:, axis]).pvalue > 1e-3


# --- Exact densities ---


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("noise_std", [0, 0.05, 0.1, 0.5, 2.0])
def test_density_integrates_to_one(dataset, noise_std):
    """By the midpoint rule, which errs by exp(-2 pi^2 std^2 / width^2) on a smooth density, here 5e-13."""
    std = np.hypot(BLUR[dataset], noise_std)
    limit = REACH[dataset] + 6.5 * std
    num_cells = int(np.ceil(2 * limit * 1.2 / std)) if std else 32  # in line with the squares
    width = 2 * limit / num_cells
    density = noisy_density_2d(dataset, grid(width * (np.arange(num_cells) + 0.5) - limit), noise_std)
    assert density.dtype == np.float64
    assert (density >= 0).all()
    assert density.sum() * width**2 == pytest.approx(1, abs=1e-6)


def gauss_legendre(length, num_nodes):
    """Nodes and weights of a mean over the interval [0, length]."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return length * (nodes + 1) / 2, weights / 2


@pytest.mark.parametrize("dataset", DATASETS)
def test_clean_density_agrees_with_a_large_histogram(dataset):
    edges = np.linspace(-4.5, 4.5, 37)
    nodes, weights = gauss_legendre(0.25, 3)
    density = noisy_density_2d(dataset, grid(np.ravel(edges[:-1, None] + nodes)), 0).reshape(36, 3, 36, 3)
    n_samples = 200_000
    expected = n_samples * 0.25**2 * np.einsum("iajb,a,b->ij", density, weights, weights).ravel()
    counts = np.histogram2d(*sample_2d_data(dataset, n_samples, rng=2).T, bins=edges)[0].ravel()
    # Pool the bins too rare for the chi-squared statistic, among them everything outside.
    common = expected > 20
    counts, expected = (np.append(x[common], n_samples - x[common].sum()) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert stats.chi2(len(counts) - 1).sf(statistic) > 1e-3


def squares(corners, size, num_nodes):
    """Nodes (n, 2) and weights (n,) of a mean over each of the squares with these lower left corners (m, 2)."""
    nodes, weights = gauss_legendre(size, num_nodes)
    return (corners[:, None] + grid(nodes)).reshape(-1, 2), np.tile(np.outer(weights, weights).ravel(), len(corners))


def independent_density(dataset, points, noise_std):
    """The noisy density by its definition: a weighted mean of Gaussians at nodes of the clean data without blur."""
    if dataset == "8gaussians":
        nodes, weights = CENTRES, np.ones(8)
    if dataset == "checkerboard":
        nodes, weights = squares(np.array(DARK_SQUARES), 2, 100)
    if dataset == "rings":
        angles = np.arange(2000) * np.pi / 1000
        nodes = (RADII[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)).reshape(-1, 2)
        weights = np.ones(len(nodes))
    if dataset == "2spirals":  # the density of the angle is proportional to the angle
        angles, angle_weights = gauss_legendre(3 * np.pi, 250)
        arm = np.stack([-angles * np.cos(angles), angles * np.sin(angles)], axis=1) / 3
        nodes, weights = squares(arm, 1 / 6, 8)
        weights = weights * np.repeat(angle_weights * angles, 8**2)
        nodes, weights = np.concatenate([nodes, -nodes]), np.tile(weights, 2)
    variance = BLUR[dataset] ** 2 + noise_std**2
    kernels = np.exp(-cdist(points, nodes, "sqeuclidean") / (2 * variance))
    return kernels @ weights / weights.sum() / (2 * np.pi * variance)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("noise_std", [0.05, 0.1, 0.6, 1.5])
def test_density_agrees_with_its_definition(dataset, noise_std):
    rng = np.random.default_rng(21)
    points = sample_2d_data(dataset, 12, rng) + noise_std * rng.standard_normal((12, 2))
    points = np.concatenate([points, [[0.3, -0.1], [-1.4, 0.6], [2.9, 0.2], [0.7, 2.3], [-2.1, -1.9]]])
    expected = independent_density(dataset, points, noise_std)
    assert np.max(expected) > 0.005
    np.testing.assert_allclose(noisy_density_2d(dataset, points, noise_std), expected, rtol=1e-6, atol=1e-9)


def test_density_far_away_is_zero_and_without_warnings():
    points = [[40.0, -40.0], [1e6, 1e6]]
    for dataset in DATASETS:
        for noise_std in (0, 0.01, 0.1):
            np.testing.assert_array_equal(noisy_density_2d(dataset, points, noise_std), 0)


# --- Modes ---


def test_distances_to_modes():
    corner = np.array(DARK_SQUARES, dtype=float)
    inside, beside, off_the_corner = (corner + np.array(move) for move in ((0.1, 1.9), (2.5, 1.0), (-0.3, 2.4)))
    for points, expected in ((inside, 0), (beside, 0.5), (off_the_corner, 0.5)):
        np.testing.assert_allclose(np.diag(distances_to_modes("checkerboard", points)), expected, atol=1e-12)
    assert distances_to_modes("checkerboard", inside).shape == (8, 8)

    angle = 1.2
    points = np.array([0.0, 0.75, 1.7, -4.0])[:, None] * [np.cos(angle), np.sin(angle)]
    np.testing.assert_allclose(distances_to_modes("rings", points), np.abs([[0], [0.75], [1.7], [4]] - RADII))

    points = CENTRES + np.array([0.3, -0.4])
    expected = np.linalg.norm(points[:, None] - CENTRES, axis=2)
    np.testing.assert_allclose(distances_to_modes("8gaussians", points), expected)


# --- Input ---

ORIGIN = np.zeros((1, 2))
NAMES = ["moons", "", None, 8, ["rings"]]
NUMBERS = [0, -1, 2.5, 3.0, "3", True, None, np.nan]
LEVELS = [-0.1, np.nan, np.inf, -np.inf, "0.1", None, True, [0.1]]
ANY_DATASET = "dataset must be one of 8gaussians, 2spirals, checkerboard, rings; got "
WITH_MODES = "dataset must be one with modes: 8gaussians, checkerboard, rings; got "
NOISE_STD = "noise_std must be a finite number of at least 0, got "


@pytest.mark.parametrize(
    ("call", "message", "values"),
    [
        (lambda v: sample_2d_data(v, 10), ANY_DATASET, NAMES),
        (lambda v: noisy_density_2d(v, ORIGIN, 0.1), ANY_DATASET, NAMES),
        (lambda v: distances_to_modes(v, ORIGIN), WITH_MODES, [*NAMES, "2spirals"]),
        (lambda v: sample_2d_data("rings", v), "n_samples must be an integer of at least 1, got ", NUMBERS),
        (lambda v: sample_2d_data("rings", 5, v), "Generator, a seed of at least 0 or None, got ", [-1, "0", 0.5]),
        *((partial(noisy_density_2d, dataset, ORIGIN), NOISE_STD, LEVELS) for dataset in DATASETS),
    ],
)
def test_bad_values_are_refused(call, message, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{message}{value!r}")):
            call(value)


def test_bad_points_are_refused():
    for call in (partial(noisy_density_2d, "rings", noise_std=0.1), partial(distances_to_modes, "rings")):
        for shape in ((), (3,), (2,), (3, 3), (2, 3, 2)):
            with pytest.raises(ValueError, match=re.escape(f"points must have shape (n, 2), got {shape}")):
                call(points=np.zeros(shape))
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match="points must be finite"):
                call(points=[[0.0, 1.0], [value, 0.0]])


def test_imports_need_no_tensorflow():
    code = "import sys, utils, egm_dde.evaluation; sys.exit(bool({'tensorflow', 'keras'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
