import re
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from scipy import stats

from egm_dde.evaluation import (
    density_metrics,
    fisher_information,
    minimum_denoising_loss,
    mode_shares,
    sample_metrics,
    sliced_wasserstein,
    sliced_wasserstein_to_data,
)
from utils import DATASETS, GAUSSIAN_CENTRES, GAUSSIAN_STD, noisy_density_2d, sample_2d_data


def exact(dataset, noise_std):
    """The exact density of noisy data, as a callable."""
    return partial(noisy_density_2d, dataset, noise_std=noise_std)


def real(dataset):
    """The sampler of clean data, as a callable."""
    return partial(sample_2d_data, dataset)


def measure_samples(samples, dataset, noise_std, **options):
    return sample_metrics(samples, exact(dataset, noise_std), real(dataset), noise_std, **options)


def exact_log_density(dataset, noise_std):
    def log_density(points):
        with np.errstate(divide="ignore"):
            return np.log(noisy_density_2d(dataset, points, noise_std))

    return log_density


def bin_probabilities(dataset, noise_std, limit, num_bins):
    """Exact probabilities (num_bins, num_bins) of the square bins on [-limit, limit]^2, by the midpoint rule."""
    width = 2 * limit / (8 * num_bins)
    axis = width * (np.arange(8 * num_bins) + 0.5) - limit
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    cells = noisy_density_2d(dataset, points, noise_std).reshape(num_bins, 8, num_bins, 8)
    return cells.sum(axis=(1, 3)) * width**2


# --- Densities ---


@pytest.mark.parametrize("dataset", DATASETS)
def test_exact_density_scores_zero_whatever_its_constant(dataset):
    log_density = exact_log_density(dataset, 0.1)
    metrics = density_metrics(lambda points: log_density(points)[:, None] + 123.0, exact(dataset, 0.1))
    assert metrics.total_variation == pytest.approx(0, abs=1e-6)
    assert metrics.kl_divergence == pytest.approx(0, abs=1e-9)


def test_density_metrics_of_densities_on_the_checkerboard():
    """Clean, it is uniform on half of [-4, 4]^2, and everything can be computed by hand."""

    def metrics(weigh):
        def log_density(points):
            dark = noisy_density_2d("checkerboard", points, 0) > 0
            inside = np.abs(points).max(axis=1) < 4
            with np.errstate(divide="ignore"):
                return np.log(weigh(dark, inside, points[:, 0]))

        return density_metrics(log_density, exact("checkerboard", 0))

    # Uniform; the other direction of the divergence would be infinite.
    assert metrics(lambda dark, inside, x: inside) == pytest.approx((1 / 2, np.log(2)))
    # A fifth of the mass in the white squares, which have the same area.
    assert metrics(lambda dark, inside, x: np.where(dark, 0.8, 0.2) * inside) == pytest.approx((0.2, -np.log(0.8)))
    # Three times as much on the right as on the left.
    expected = (1 / 4, -np.log(1 / 2) / 2 - np.log(3 / 2) / 2)
    assert metrics(lambda dark, inside, x: np.where(x > 0, 3, 1) * dark) == pytest.approx(expected)
    # Nothing in the column on the left.
    assert metrics(lambda dark, inside, x: dark & (x > -2)) == pytest.approx((1 / 4, np.inf))


@pytest.mark.parametrize("noise_std", [0.1, 0.5])
def test_divergence_of_a_tilted_density(noise_std):
    """For q~ proportional to p~ exp(tilt x), KL(p~ || q~) is the log of the moment-generating function."""
    tilt = np.array([0.5, -0.3])
    variance = GAUSSIAN_STD**2 + noise_std**2
    expected = np.log(np.mean(np.exp(GAUSSIAN_CENTRES @ tilt))) + tilt @ tilt * variance / 2

    log_density = exact_log_density("8gaussians", noise_std)
    metrics = density_metrics(
        lambda points: log_density(points) + points @ tilt, exact("8gaussians", noise_std), limit=7
    )
    assert metrics.kl_divergence == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dataset", ["8gaussians", "checkerboard", "rings"])
def test_quadrature_error_is_below_what_is_stated(dataset):
    coarse, fine = (
        density_metrics(exact_log_density(dataset, 0.13), exact(dataset, 0.1), num_cells=num_cells)
        for num_cells in (90, 360)
    )
    assert coarse == pytest.approx(fine, abs=1e-4)
    assert fine.total_variation > 0.01


def test_divergence_survives_underflow():
    metrics = density_metrics(lambda points: -1e4 * (points**2).sum(axis=1), exact("rings", 0.1))
    assert metrics.total_variation == pytest.approx(1, abs=0.01)
    assert 1e4 < metrics.kl_divergence < 1e5


def test_log_density_is_called_once_with_points_of_the_square():
    log_density = Mock(side_effect=lambda points: points[:, 0])
    density_metrics(log_density, exact("rings", 0.1), limit=5, num_cells=40)
    log_density.assert_called_once()
    (points,) = log_density.call_args.args
    assert points.dtype == np.float32
    assert points.shape == (80 * 80, 2)
    assert 4.8 < points.max() < 5
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize(("noise_std", "limit"), [(0.1, 2.0), (1.0, 4.5)])
def test_squares_that_miss_the_mass_are_refused(noise_std, limit):
    log_density, exact_density = exact_log_density("8gaussians", noise_std), exact("8gaussians", noise_std)
    for metric in (partial(density_metrics, log_density), fisher_information):
        with pytest.raises(ValueError, match=f"limit={limit} and .*take a larger limit"):
            metric(exact_density, limit=limit)
    assert density_metrics(log_density, exact_density, limit=8).total_variation < 1e-6


# --- The least loss ---


@pytest.mark.parametrize(("data_std", "noise_std"), [([0.5, 0.2], 0.1), ([0.1, 0.4], 0.3), ([0.0, 0.0], 0.05)])
def test_fisher_information_of_a_gaussian(data_std, noise_std):
    variance = np.square(data_std) + noise_std**2  # along each axis

    def density(points):  # off the centre of the grid, and of its cells
        squares = (points - [0.31, -1.234]) ** 2 / variance
        return np.exp(-squares.sum(axis=1) / 2) / (2 * np.pi * np.sqrt(variance.prod()))

    assert fisher_information(density) == pytest.approx((1 / variance).sum(), rel=1e-5)
    # The best estimator of the noise knows the share noise_std^2 / variance of its variance.
    expected = (np.square(data_std) / variance).mean()
    assert minimum_denoising_loss(density, noise_std) == pytest.approx(expected, abs=1e-5)
    if any(data_std):
        assert minimum_denoising_loss(density, noise_std, num_cells=200) == pytest.approx(expected, abs=1e-3)


def test_fisher_information_is_not_cut_off():
    """Tails beyond the square cost more of it than of the mass: a mass of 99 % would not do."""
    for dataset in DATASETS:
        precise = fisher_information(exact(dataset, 1.5), limit=14.0, num_cells=560)
        assert fisher_information(exact(dataset, 1.5)) == pytest.approx(precise, rel=1e-3)
    with pytest.raises(ValueError, match="take a larger limit"):
        fisher_information(exact("2spirals", 0.8), limit=5.0, num_cells=200)


# --- Samples in bins ---


def test_floor_of_two_million_samples():
    metrics = measure_samples(sample_2d_data("2spirals", 2_000_000, rng=1), "2spirals", 0.1, rng=2)
    assert metrics.total_variation.floor == pytest.approx(0.0135, abs=0.0005)
    assert metrics.total_variation.value == pytest.approx(metrics.total_variation.floor, rel=0.05)


@pytest.mark.parametrize("dataset", ["8gaussians", "checkerboard", "rings"])
@pytest.mark.parametrize("noise_std", [0.1, 0.5])
def test_real_samples_score_the_floor_and_it_is_the_expected_one(dataset, noise_std):
    n_samples = 100_000
    samples = sample_2d_data(dataset, n_samples, rng=1)
    metrics = measure_samples(samples, dataset, noise_std, rng=2, limit=5, num_bins=40)

    # The mean absolute deviation of every bin's binomial count (de Moivre).
    probabilities = bin_probabilities(dataset, noise_std, limit=5, num_bins=40).ravel()
    probabilities = np.append(probabilities, max(0, 1 - probabilities.sum()))
    next_count = np.floor(n_samples * probabilities) + 1
    deviations = 2 * next_count * (1 - probabilities) * stats.binom.pmf(next_count, n_samples, probabilities)
    expected = deviations.sum() / n_samples / 2

    assert metrics.total_variation == pytest.approx((expected, expected), rel=0.12)
    assert 0 < metrics.kl_divergence.value < 0.01
    assert metrics.kl_divergence.value == pytest.approx(metrics.kl_divergence.floor, rel=0.3)


def test_a_dropped_mode_costs_its_mass():
    rng = np.random.default_rng(3)
    samples = GAUSSIAN_CENTRES[rng.integers(1, 8, 200_000)] + GAUSSIAN_STD * rng.standard_normal((200_000, 2))
    metrics = measure_samples(samples, "8gaussians", 0.1, rng=4, num_bins=18)
    assert metrics.total_variation.value == pytest.approx(1 / 8, abs=0.005)
    assert metrics.total_variation.floor < 0.015
    # KL(q || p) = log(8 / 7); the other direction would be infinite.
    assert metrics.kl_divergence.value == pytest.approx(np.log(8 / 7), abs=0.005)
    assert metrics.kl_divergence.floor < 0.002


def test_noise_is_added_to_the_samples():
    """A point mass becomes N(0, noise_std^2 I): its bins are known."""
    point = np.array([0.75, 2.25])
    metrics = measure_samples(np.tile(point, (200_000, 1)), "checkerboard", 0.3, rng=5, num_bins=18)
    edges = np.linspace(-4.5, 4.5, 19)
    across, along = (np.diff(stats.norm(centre, 0.3).cdf(edges)) for centre in point)
    differences = np.outer(across, along) - bin_probabilities("checkerboard", 0.3, limit=4.5, num_bins=18)
    assert metrics.total_variation.value == pytest.approx(np.abs(differences).sum() / 2, abs=0.003)


def test_mass_outside_the_square_counts():
    samples = sample_2d_data("rings", 50_000, rng=1)
    odd = np.arange(len(samples))[:, None] % 2 == 1
    for far in (5.0, -1e6):  # beyond either edge
        metrics = measure_samples(np.where(odd, samples, far), "rings", 0.1, rng=2, num_bins=18)
        assert metrics.total_variation.value == pytest.approx(1 / 2, abs=0.02)
        assert metrics.total_variation.floor < 0.025  # wide bins are no excuse for a coarse quadrature
    metrics = measure_samples(np.full((1000, 2), 100.0), "rings", 0.1, rng=2)
    assert metrics.total_variation.value == pytest.approx(1)
    assert 20 < metrics.kl_divergence.value < np.inf


def test_sample_metrics_depend_on_rng_alone():
    samples = sample_2d_data("rings", 1000, rng=0)
    measure = partial(measure_samples, samples, "rings", 0.1)
    assert measure(rng=1) == measure_samples(samples.tolist(), "rings", 0.1, rng=np.random.default_rng(1))
    assert measure(rng=1) != measure(rng=2)
    assert measure() != measure()


# --- Sliced Wasserstein ---


@pytest.mark.parametrize("shift", [[0.3, 0.0], [1.0, 1.0], [0.5, -0.5]])
def test_sliced_wasserstein_of_a_shift(shift):
    """It is |shift| times the mean of |cos|, and 48 directions would be off by more."""
    samples = sample_2d_data("2spirals", 1000, rng=0)
    expected = 2 / np.pi * np.hypot(*shift)
    assert sliced_wasserstein(samples, samples + np.array(shift)) == pytest.approx(expected, rel=2.5e-4)


def test_sliced_wasserstein_agrees_with_scipy():
    one, other = sample_2d_data("rings", 500, rng=0), sample_2d_data("2spirals", 500, rng=1)
    directions = [(np.cos(angle), np.sin(angle)) for angle in (0, np.pi / 3, 2 * np.pi / 3)]
    expected = np.mean([stats.wasserstein_distance(one @ each, other @ each) for each in directions])
    assert sliced_wasserstein(one, other, num_projections=3) == pytest.approx(expected, rel=1e-5)
    assert sliced_wasserstein(other, one, num_projections=3) == pytest.approx(expected, rel=1e-5)
    assert sliced_wasserstein(one, one[::-1]) == pytest.approx(0, abs=1e-6)  # the rounding of float32


@pytest.mark.parametrize("dataset", DATASETS)
def test_real_samples_are_at_the_sliced_wasserstein_floor(dataset):
    samples = sample_2d_data(dataset, 100_000, rng=1)
    options = {"sample_real": real(dataset), "rng": 2, "block_size": 2000}
    distance = sliced_wasserstein_to_data(samples, **options)
    assert distance.value == pytest.approx(distance.floor, rel=0.2)
    assert 0.03 < distance.floor < 0.1
    assert distance.ratio == distance.value / distance.floor
    assert abs(distance.ratio - 1) < 4 * distance.ratio_std_error < 0.3
    moved = sliced_wasserstein_to_data(samples + 0.5, **options)
    assert moved.floor == distance.floor  # it does not depend on the generated samples
    assert moved.value == pytest.approx(2 / np.pi * np.hypot(0.5, 0.5), rel=0.05)


def test_sliced_wasserstein_standard_errors_are_the_scatter():
    """Of independent estimates, each from ten pairs."""
    results = []
    for seed in range(40):
        samples = sample_2d_data("rings", 2000, rng=1000 + seed)
        results.append(sliced_wasserstein_to_data(samples, real("rings"), seed, block_size=200))
    scatter, mean = np.std(results, axis=0, ddof=1), np.mean(results, axis=0)
    assert len(set(results)) == 40
    # The scatter of 40 numbers is known to 11 %.
    for number, error in ((0, 2), (1, 3), (4, 5)):
        assert scatter[number] == pytest.approx(mean[error], rel=0.4)
    # They share real samples: independent errors of value and floor would add up to a larger one.
    assert mean[5] < 0.9 * np.hypot(mean[2], mean[3]) / mean[1]


def test_sliced_wasserstein_floor_falls_with_the_block_size():
    samples = sample_2d_data("rings", 64_000, rng=1)

    def measure(samples, block_size=50_000, rng=2):
        return sliced_wasserstein_to_data(samples, real("rings"), rng, block_size=block_size)

    assert measure(samples, 1000).floor / measure(samples, 4000).floor == pytest.approx(2, rel=0.15)
    few = samples[:3009]
    assert measure(few) == measure(few, 300)  # at least ten pairs
    assert measure(few) == measure(few[:3000])  # a remainder is left out


# --- Modes ---


def test_mode_shares_count_for_the_nearest_mode():
    counts = np.array([1, 2, 3, 4, 5, 6, 7, 0])
    np.testing.assert_allclose(mode_shares(np.repeat(1.3 - np.eye(8), counts, axis=0)), counts / 28)


# --- Bad arguments ---

POINTS = np.zeros((20, 2))
RINGS = {"exact_density": exact("rings", 0.1), "limit": 4.5}
DENSITY = partial(density_metrics, log_density=lambda points: points[:, 0], **RINGS)
FISHER = partial(fisher_information, num_cells=90, **RINGS)
LOSS = partial(minimum_denoising_loss, noise_std=0.1, **RINGS)
SAMPLES = partial(sample_metrics, samples=POINTS, sample_real=real("rings"), noise_std=0.1, **RINGS)
WASSERSTEIN = partial(sliced_wasserstein, samples_a=POINTS, samples_b=POINTS)
TO_DATA = partial(sliced_wasserstein_to_data, samples=POINTS, sample_real=real("rings"))
ON_SQUARES = [DENSITY, FISHER, SAMPLES]


@pytest.mark.parametrize(
    ("metrics", "option", "values", "message"),
    [
        (ON_SQUARES, "limit", [0, np.nan, "4"], "a positive finite number"),
        ([DENSITY, FISHER], "num_cells", [0, 90.5, True], "an integer of at least 1"),
        ([SAMPLES], "num_bins", [0, 90.5, True], "an integer of at least 1"),
        ([SAMPLES], "noise_std", [-0.1, np.nan, True, None], "a finite number of at least 0"),
        ([LOSS], "noise_std", [0, -0.1, np.nan, None], "a positive finite number"),
        ([WASSERSTEIN], "num_projections", [0, 2.5, True], "an integer of at least 1"),
        ([TO_DATA], "block_size", [0], "an integer of at least 1"),
    ],
)
def test_bad_numbers_are_refused(metrics, option, values, message):
    for metric in metrics:
        for value in values:
            with pytest.raises(ValueError, match=re.escape(f"{option} must be {message}, got {value!r}")):
                metric(**{option: value})


@pytest.mark.parametrize(
    ("metrics", "option", "value", "message"),
    [
        (ON_SQUARES, "exact_density", lambda x: x, r"exact_density must return shape \((32400|8100),\), got"),
        (ON_SQUARES, "exact_density", lambda x: -np.ones(len(x)), "exact_density must return finite numbers of"),
        (ON_SQUARES, "exact_density", lambda x: x[:, 0] * np.nan, "exact_density must return finite numbers of"),
        ([SAMPLES], "sample_real", lambda n, rng: np.zeros((3, 2)), "sample_real must return 20 samples, got 3"),
        ([TO_DATA], "sample_real", lambda n, rng: np.zeros((3, 2)), "sample_real must return 2 samples, got 3"),
        ([TO_DATA], "samples", np.zeros((9, 2)), "samples must be at least 10, got 9"),
        ([WASSERSTEIN], "samples_b", np.zeros((6, 2)), "equally many, got 20 and 6"),
        ([mode_shares], "distances", np.zeros(3), "distances must have shape"),
        ([mode_shares], "distances", np.zeros((0, 3)), "at least one point"),
        ([mode_shares], "distances", [[0.0, np.nan]], "distances must be finite"),
    ],
)
def test_bad_arrays_are_refused(metrics, option, value, message):
    for metric in metrics:
        with pytest.raises(ValueError, match=message):
            metric(**{option: value})


@pytest.mark.parametrize(
    ("metric", "option"),
    [
        *((metric, option) for metric in (SAMPLES, TO_DATA) for option in ("samples", "sample_real")),
        *((WASSERSTEIN, option) for option in ("samples_a", "samples_b")),
    ],
)
def test_bad_samples_are_refused(metric, option):
    def call(value):
        metric(**{option: (lambda n_samples, rng: value) if option == "sample_real" else value})

    for shape in ((3,), (4, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match=rf"{option} must have shape \(n, 2\), got {re.escape(str(shape))}"):
            call(np.zeros(shape))
    with pytest.raises(ValueError, match="at least one point"):
        call(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"must be finite, got NaN, infinity .* in 2 of 4 points"):
        call([[0, 0], [np.nan, 0], [1, np.inf], [0, 1]])


def test_bad_log_densities_are_refused():
    num_points = 180**2
    for shape in ((num_points, 2), (num_points - 1,), (1, num_points), ()):
        with pytest.raises(ValueError, match=re.escape(f"must return shape (n,) or (n, 1), got {shape}")):
            DENSITY(log_density=lambda points, shape=shape: np.zeros(shape))
    for first, others in ((np.nan, 0), (np.inf, 0), (-np.inf, -np.inf)):
        values = np.append(first, np.full(num_points - 1, others))
        with pytest.raises(ValueError, match=f"log_density must be finite or -inf, .* maximum is {first}"):
            DENSITY(log_density=lambda points, values=values: values)
