import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import erf

from utils import DATASETS, distances_to_modes, noisy_density_2d, sample_2d_data

# Written out again, so that a slip in the module's constants shows.
BLUR = {"8gaussians": 0.5 / 2**0.5, "2spirals": 0.1, "checkerboard": 0.0, "rings": 0.08}
REACH = {"8gaussians": 4 / 2**0.5, "2spirals": 3 * np.pi / 3 + 0.25, "checkerboard": 4.0, "rings": 3.0}
DARK_SQUARES = [(-4, -4), (-4, 0), (-2, -2), (-2, 2), (0, -4), (0, 0), (2, -2), (2, 2)]  # lower left corners
RADII = np.array([3, 2.25, 1.5, 0.75])


def midpoint_grid(limit, num_cells):
    """Midpoints (num_cells^2, 2) of equal cells of [-limit, limit]^2, and the area of a cell."""
    width = 2 * limit / num_cells
    axis = width * (np.arange(num_cells) + 0.5) - limit
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2), width**2


def density_on_grid(dataset, noise_std):
    """Exact densities on a grid on which the midpoint rule is exact to about 1e-9, and the area of a cell."""
    std = np.hypot(BLUR[dataset], noise_std)
    if std == 0:
        points, area = midpoint_grid(4.0, 32)  # in line with the squares
    else:
        # On a smooth density the midpoint rule errs by exp(-2 pi^2 std^2 / width^2), here 5e-13.
        limit = REACH[dataset] + 6.5 * std
        points, area = midpoint_grid(limit, int(np.ceil(2 * limit * 1.2 / std)))
    return noisy_density_2d(dataset, points, noise_std), area


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

    def p_value_of_independence(labels, cells):
        table = stats.contingency.crosstab(labels, cells).count
        return stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue

    index = np.arange(len(cells))
    assert p_value_of_independence(index < len(cells) // 2, cells) > 1e-3  # as arms one after the other would not
    assert p_value_of_independence(index % 2, cells) > 1e-3
    assert p_value_of_independence(index % 8, cells) > 1e-3
    assert p_value_of_independence(cells[:-1:2], cells[1::2]) > 1e-3  # a row says nothing about the next one


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
    density, area = density_on_grid(dataset, noise_std)
    assert density.dtype == np.float64
    assert (density >= 0).all()
    assert density.sum() * area == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("noise_std", [0.05, 0.1, 0.5, 1.5])
def test_density_agrees_with_a_large_kernel_estimate(dataset, noise_std):
    """The mean of Gaussian kernels as wide as the noise is an unbiased estimate of the noisy density."""
    rng = np.random.default_rng(21)
    points = sample_2d_data(dataset, 12, rng) + noise_std * rng.standard_normal((12, 2))
    data = sample_2d_data(dataset, 400_000, rng)
    exact = noisy_density_2d(dataset, points, noise_std)
    for point, density in zip(points, exact, strict=True):
        squared_distances = ((data - point) ** 2).sum(axis=1)
        kernels = np.exp(-squared_distances / (2 * noise_std**2)) / (2 * np.pi * noise_std**2)
        assert abs(kernels.mean() - density) < 4 * kernels.std() / np.sqrt(len(data))


@pytest.mark.parametrize("dataset", DATASETS)
def test_clean_density_agrees_with_a_large_histogram(dataset):
    edges = np.linspace(-4.5, 4.5, 37)
    nodes, weights = np.polynomial.legendre.leggauss(3)
    axis = np.ravel(edges[:-1, None] + 0.25 * (nodes + 1) / 2)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    density = noisy_density_2d(dataset, points, 0).reshape(36, 3, 36, 3)
    n_samples = 200_000
    expected = n_samples * np.einsum("iajb,a,b->ij", density, weights / 8, weights / 8).ravel()
    counts = np.histogram2d(*sample_2d_data(dataset, n_samples, rng=2).T, bins=edges)[0].ravel()
    # Pool the bins too rare for the chi-squared statistic, among them everything outside.
    common = expected > 20
    counts = np.append(counts[common], n_samples - counts[common].sum())
    expected = np.append(expected[common], n_samples - expected[common].sum())
    if expected[-1] < 1:
        assert counts[-1] < 10
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2(len(counts) - 1).sf(statistic) > 1e-3


def normal_density(squared_distance, std):
    return np.exp(-squared_distance / (2 * std**2)) / (2 * np.pi * std**2)


def independent_density(dataset, x, y, noise_std):
    """The noisy density at one point, by adaptive quadrature of its definition."""
    std = np.hypot(BLUR[dataset], noise_std)
    if dataset == "8gaussians":
        centres = [(4 / 2**0.5 * np.cos(k * np.pi / 4), 4 / 2**0.5 * np.sin(k * np.pi / 4)) for k in range(8)]
        return np.mean([stats.multivariate_normal(centre, std**2).pdf((x, y)) for centre in centres])
    if dataset == "checkerboard":
        squares = [
            integrate.dblquad(lambda v, u: normal_density((x - u) ** 2 + (y - v) ** 2, std), a, a + 2, b, b + 2)[0]
            for a, b in DARK_SQUARES
        ]
        return np.sum(squares) / 32
    if dataset == "rings":

        def circle(angle, radius):
            return normal_density((x - radius * np.cos(angle)) ** 2 + (y - radius * np.sin(angle)) ** 2, std)

        here = np.arctan2(y, x)
        rings = [
            integrate.quad(circle, here - np.pi, here + np.pi, args=(r,), points=[here], limit=500)[0] for r in RADII
        ]
        return np.mean(rings) / (2 * np.pi)

    def interval(offset):
        """Density at an offset from the start of a uniform interval of length 1/6, blurred."""
        return (erf(offset / (std * 2**0.5)) - erf((offset - 1 / 6) / (std * 2**0.5))) / 2 * 6

    def arm(t, sign):
        return interval(sign * x + t * np.cos(t) / 3) * interval(sign * y - t * np.sin(t) / 3) * t

    pieces = np.linspace(0, 3 * np.pi, 13)
    total = sum(integrate.quad(arm, a, b, args=(s,))[0] for s in (1, -1) for a, b in itertools.pairwise(pieces))
    return total / (3 * np.pi) ** 2


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("noise_std", [0.1, 0.6])
def test_density_agrees_with_adaptive_quadrature(dataset, noise_std):
    points = np.array([[0.3, -0.1], [-1.4, 0.6], [2.9, 0.2], [0.7, 2.3], [-2.1, -1.9]])
    expected = [independent_density(dataset, x, y, noise_std) for x, y in points]
    assert np.max(expected) > 0.005
    np.testing.assert_allclose(noisy_density_2d(dataset, points, noise_std), expected, rtol=1e-6, atol=1e-9)


def test_entropies_of_the_clean_data():
    def entropy(dataset):
        density, area = density_on_grid(dataset, 0)
        density = density[density > 0]
        return -(density * np.log(density)).sum() * area

    assert entropy("checkerboard") == pytest.approx(np.log(32), abs=1e-9)
    # Of modes that do not overlap: their number, and the entropy of one. They do overlap a little.
    assert entropy("8gaussians") == pytest.approx(np.log(8) + np.log(2 * np.pi * np.e * 0.125), abs=0.01)
    circles = np.log(4) + np.mean(np.log(2 * np.pi * RADII))
    assert entropy("rings") == pytest.approx(circles + np.log(2 * np.pi * np.e * 0.08**2) / 2, abs=2e-3)


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

    centres = 4 / 2**0.5 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)
    points = centres + np.array([0.3, -0.4])
    expected = np.linalg.norm(points[:, None] - centres, axis=2)
    np.testing.assert_allclose(distances_to_modes("8gaussians", points), expected)


@pytest.mark.parametrize("dataset", ["2spirals", "moons", None, ["rings"]])
def test_distributions_without_modes_are_refused(dataset):
    with pytest.raises(ValueError, match="8gaussians, checkerboard, rings; got") as error:
        distances_to_modes(dataset, np.zeros((5, 2)))
    assert repr(dataset) in str(error.value)


# --- Input ---


@pytest.mark.parametrize("dataset", ["moons", "", None, 8, ["rings"]])
def test_unknown_dataset_is_refused(dataset):
    for call in (
        lambda: sample_2d_data(dataset, 10),
        lambda: noisy_density_2d(dataset, np.zeros((1, 2)), 0.1),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert repr(dataset) in str(error.value)
        assert all(name in str(error.value) for name in ("8gaussians", "2spirals", "checkerboard", "rings"))


@pytest.mark.parametrize("n_samples", [0, -1, 2.5, 3.0, "3", True, None, np.nan])
def test_bad_n_samples_is_refused(n_samples):
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1") as error:
        sample_2d_data("rings", n_samples)
    assert repr(n_samples) in str(error.value)


@pytest.mark.parametrize("noise_std", [-0.1, np.nan, np.inf, -np.inf, "0.1", None, True, [0.1]])
@pytest.mark.parametrize("dataset", DATASETS)
def test_bad_noise_std_is_refused(dataset, noise_std):
    with pytest.raises(ValueError, match="noise_std must be a finite number of at least 0") as error:
        noisy_density_2d(dataset, np.zeros((1, 2)), noise_std)
    assert repr(noise_std) in str(error.value)


@pytest.mark.parametrize("shape", [(), (3,), (2,), (3, 3), (2, 3, 2)])
def test_points_of_another_shape_are_refused(shape):
    for call in (
        lambda points: noisy_density_2d("rings", points, 0.1),
        lambda points: distances_to_modes("rings", points),
    ):
        with pytest.raises(ValueError, match=r"points must have shape \(n, 2\)") as error:
            call(np.zeros(shape))
        assert str(shape) in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_points_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="points must be finite"):
        noisy_density_2d("rings", [[0.0, 1.0], [value, 0.0]], 0.1)


def test_imports_need_no_tensorflow():
    code = "import sys, utils, egm_dde.evaluation; sys.exit(bool({'tensorflow', 'keras'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
