from functools import partial

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
from utils import (
    DATASETS,
    GAUSSIAN_CENTRES,
    GAUSSIAN_STD,
    RING_RADII,
    SQUARE_CORNERS,
    distances_to_modes,
    noisy_density_2d,
    sample_2d_data,
)


def exact(dataset, noise_std):
    """The exact density of noisy data, as a callable."""
    return partial(noisy_density_2d, dataset, noise_std=noise_std)


def real(dataset):
    """The sampler of clean data, as a callable."""
    return partial(sample_2d_data, dataset)


def exact_log_density(dataset, noise_std):
    def log_density(points):
        with np.errstate(divide="ignore"):
            return np.log(noisy_density_2d(dataset, points, noise_std))

    return log_density


def gaussians_with_shares(shares, n_samples, seed):
    """Samples (n_samples, 2) of 8gaussians with other mode shares than 1/8."""
    rng = np.random.default_rng(seed)
    modes = rng.choice(8, size=n_samples, p=np.asarray(shares) / np.sum(shares))
    return GAUSSIAN_CENTRES[modes] + GAUSSIAN_STD * rng.standard_normal((n_samples, 2))


# --- Densities ---


@pytest.mark.parametrize("dataset", DATASETS)
def test_exact_density_scores_zero_whatever_its_constant(dataset):
    log_density = exact_log_density(dataset, 0.1)
    metrics = density_metrics(lambda points: log_density(points)[:, None] + 123.0, exact(dataset, 0.1))
    assert metrics.total_variation == pytest.approx(0, abs=1e-6)
    assert metrics.kl_divergence == pytest.approx(0, abs=1e-9)


def test_density_metrics_of_densities_on_the_checkerboard():
    """Clean, it is uniform on half of [-4, 4]^2, and everything can be computed by hand."""

    def dark(points):
        return noisy_density_2d("checkerboard", points, 0) > 0

    def log_uniform(points):
        return np.where(np.abs(points).max(axis=1) < 4, 0.0, -np.inf)

    def metrics(log_density):
        return density_metrics(log_density, exact("checkerboard", 0))

    # The other direction of the divergence would be infinite.
    assert metrics(log_uniform) == pytest.approx((1 / 2, np.log(2)))

    def log_leaking(points):  # a fifth of the mass in the white squares, which have the same area
        return np.where(dark(points), np.log(0.8), np.log(0.2)) + log_uniform(points)

    assert metrics(log_leaking) == pytest.approx((0.2, -np.log(0.8)))

    def log_lopsided(points):  # three times as much on the right as on the left
        return np.where(dark(points), np.where(points[:, 0] > 0, np.log(3), 0.0), -np.inf)

    expected = (1 / 4, -np.log(1 / 2) / 2 - np.log(3 / 2) / 2)
    assert metrics(log_lopsided) == pytest.approx(expected)

    def log_missing(points):
        return np.where(dark(points) & (points[:, 0] > -2), 0.0, -np.inf)

    assert metrics(log_missing) == pytest.approx((1 / 4, np.inf))


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


def test_density_metrics_see_noise_of_another_level():
    def variation(model_noise):
        return density_metrics(exact_log_density("8gaussians", model_noise), exact("8gaussians", 0.1))

    # Between N(0, a I) and N(0, b I): ratio - 1 - log(ratio) in nats with ratio = a / b, up to some overlap.
    ratio = (GAUSSIAN_STD**2 + 0.1**2) / (GAUSSIAN_STD**2 + 0.2**2)
    assert variation(0.2).kl_divergence == pytest.approx(ratio - 1 - np.log(ratio), rel=0.1)
    # exp(-r^2 / 2a) / a and the same with b cross at one radius.
    radius_squared = 2 * np.log(ratio) / (1 - 1 / ratio)  # in units of a
    expected = np.exp(-radius_squared * ratio / 2) - np.exp(-radius_squared / 2)
    assert variation(0.2).total_variation == pytest.approx(expected, rel=0.1)
    assert variation(0.11).total_variation < variation(0.12).total_variation < variation(0.2).total_variation


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
    calls = []

    def log_density(points):
        calls.append(points)
        return np.zeros(len(points), np.float32)

    density_metrics(log_density, exact("rings", 0.1), limit=5, num_cells=40)
    (points,) = calls
    assert points.dtype == np.float32
    assert points.shape == (80 * 80, 2)
    assert 4.8 < points.max() < 5
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize(("first", "others"), [(np.nan, 0), (np.inf, 0), (-np.inf, -np.inf)])
def test_log_densities_without_a_finite_maximum_are_refused(first, others):
    def log_density(points):
        return np.append(first, np.full(len(points) - 1, others))

    with pytest.raises(ValueError, match=f"log_density must be finite or -inf, .* maximum is {first}"):
        density_metrics(log_density, exact("rings", 0.1))


@pytest.mark.parametrize("shape", [(32400, 2), (32399,), (1, 32400), ()])
def test_log_densities_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="must return shape") as error:
        density_metrics(lambda points: np.zeros(shape), exact("rings", 0.1))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda number=90, **options: density_metrics(
            lambda points: points[:, 0], **{"exact_density": exact("rings", 0.1), "num_cells": number, **options}
        ),
        lambda number=90, **options: fisher_information(
            **{"exact_density": exact("rings", 0.1), "limit": 4.5, "num_cells": number, **options}
        ),
        lambda number=90, **options: sample_metrics(
            np.zeros((5, 2)),
            sample_real=real("rings"),
            noise_std=0.1,
            **{"exact_density": exact("rings", 0.1), "num_bins": number, **options},
        ),
    ],
    ids=["density", "fisher", "samples"],
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "limit must be .*0"),
        ({"limit": np.nan}, "limit must be .*nan"),
        ({"limit": "4"}, "limit must be .*'4'"),
        ({"number": 0}, "num_(cells|bins) must be .*0"),
        ({"number": 90.5}, "num_(cells|bins) must be .*90.5"),
        ({"number": True}, "num_(cells|bins) must be .*True"),
        ({"exact_density": lambda points: points}, r"exact_density must return shape \((32400|8100),\), got"),
        (
            {"exact_density": lambda points: -np.ones(len(points))},
            "exact_density must return finite numbers of at least",
        ),
        (
            {"exact_density": lambda points: points[:, 0] * np.nan},
            "exact_density must return finite numbers of at least",
        ),
    ],
)
def test_bad_settings_are_refused(call, changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(("noise_std", "limit"), [(0.1, 2.0), (1.0, 4.5)])
def test_squares_that_miss_the_mass_are_refused(noise_std, limit):
    log_density, exact_density = exact_log_density("8gaussians", noise_std), exact("8gaussians", noise_std)
    for call in (
        lambda limit: density_metrics(log_density, exact_density, limit=limit),
        lambda limit: fisher_information(exact_density, limit),
    ):
        with pytest.raises(ValueError, match=f"limit={limit} and .*take a larger limit"):
            call(limit)
    assert density_metrics(log_density, exact_density, limit=8).total_variation < 1e-6


# --- The least loss ---


@pytest.mark.parametrize(("data_std", "noise_std"), [(0.5, 0.1), (0.1, 0.3), (0.0, 0.05)])
def test_fisher_information_of_a_gaussian(data_std, noise_std):
    variance = data_std**2 + noise_std**2

    def density(points):  # off the centre of the grid, and of its cells
        return np.exp(-((points - [0.31, -1.234]) ** 2).sum(axis=1) / (2 * variance)) / (2 * np.pi * variance)

    assert fisher_information(density) == pytest.approx(2 / variance, rel=1e-5)
    # The best estimator of the noise knows the share noise_std^2 / variance of its variance.
    expected = data_std**2 / variance
    assert minimum_denoising_loss(density, noise_std) == pytest.approx(expected, abs=1e-5)
    if data_std:
        assert minimum_denoising_loss(density, noise_std, num_cells=200) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("noise_std", [0.05, 0.1, 0.2])
def test_least_loss_of_8_gaussians(noise_std):
    rng = np.random.default_rng(1)
    variance = GAUSSIAN_STD**2 + noise_std**2
    points = sample_2d_data("8gaussians", 400_000, rng) + noise_std * rng.standard_normal((400_000, 2))
    logits = (points @ GAUSSIAN_CENTRES.T) / variance  # the centres are equally far from the origin
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = (weights @ GAUSSIAN_CENTRES / weights.sum(axis=1, keepdims=True) - points) / variance
    squares = (scores**2).sum(axis=1)
    information = fisher_information(exact("8gaussians", noise_std))
    assert abs(squares.mean() - information) < 4 * squares.std() / np.sqrt(len(squares))

    # Summed over coordinates and in data units; a little more than if the Gaussians did not overlap.
    summed = minimum_denoising_loss(exact("8gaussians", noise_std), noise_std) * 2 / noise_std**2
    apart = 2 / noise_std**2 - 2 / variance
    assert apart == pytest.approx({0.05: 784.3, 0.1: 185.2, 0.2: 37.9}[noise_std], abs=0.05)
    assert apart < summed < apart + 1.1


def test_fisher_information_is_not_cut_off():
    """Tails beyond the square cost more of it than of the mass: a mass of 99 % would not do."""
    for dataset in DATASETS:
        precise = fisher_information(exact(dataset, 1.5), limit=14.0, num_cells=560)
        assert fisher_information(exact(dataset, 1.5)) == pytest.approx(precise, rel=1e-3)
    with pytest.raises(ValueError, match="take a larger limit"):
        fisher_information(exact("2spirals", 0.8), limit=5.0, num_cells=200)


@pytest.mark.parametrize("noise_std", [0, -0.1, np.nan, None])
def test_bad_noise_of_the_least_loss_is_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std must be a positive finite number"):
        minimum_denoising_loss(exact("rings", 0.1), noise_std)


# --- Samples in bins ---


def test_floor_of_two_million_samples():
    metrics = sample_metrics(
        sample_2d_data("2spirals", 2_000_000, rng=1), exact("2spirals", 0.1), real("2spirals"), 0.1, rng=2
    )
    assert metrics.total_variation.floor == pytest.approx(0.0135, abs=0.0005)
    assert metrics.total_variation.value == pytest.approx(metrics.total_variation.floor, rel=0.05)
    assert metrics.kl_divergence.value == pytest.approx(metrics.kl_divergence.floor, rel=0.1)


@pytest.mark.parametrize("dataset", ["8gaussians", "checkerboard", "rings"])
@pytest.mark.parametrize("noise_std", [0.1, 0.5])
def test_real_samples_score_the_floor_and_it_is_the_expected_one(dataset, noise_std):
    n_samples = 100_000
    samples = sample_2d_data(dataset, n_samples, rng=1)
    metrics = sample_metrics(samples, exact(dataset, noise_std), real(dataset), noise_std, rng=2, limit=5, num_bins=40)

    # The mean absolute deviation of every bin's binomial count (de Moivre), from a finer grid.
    axis = np.arange(-5 + 1 / 64, 5, 1 / 32)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    cells = noisy_density_2d(dataset, points, noise_std).reshape(40, 8, 40, 8) / 32**2
    probabilities = cells.sum(axis=(1, 3)).ravel()
    probabilities = np.append(probabilities, max(0, 1 - probabilities.sum()))
    next_count = np.floor(n_samples * probabilities) + 1
    deviations = 2 * next_count * (1 - probabilities) * stats.binom.pmf(next_count, n_samples, probabilities)
    expected = deviations.sum() / n_samples / 2

    assert metrics.total_variation == pytest.approx((expected, expected), rel=0.12)
    assert 0 < metrics.kl_divergence.value < 0.01
    assert metrics.kl_divergence.value == pytest.approx(metrics.kl_divergence.floor, rel=0.3)


def test_a_dropped_mode_costs_its_mass():
    samples = gaussians_with_shares([0, 1, 1, 1, 1, 1, 1, 1], 200_000, seed=3)
    metrics = sample_metrics(samples, exact("8gaussians", 0.1), real("8gaussians"), 0.1, rng=4, num_bins=18)
    assert metrics.total_variation.value == pytest.approx(1 / 8, abs=0.005)
    assert metrics.total_variation.floor < 0.015
    # KL(q || p) = log(8 / 7); the other direction would be infinite.
    assert metrics.kl_divergence.value == pytest.approx(np.log(8 / 7), abs=0.005)
    assert metrics.kl_divergence.floor < 0.002


def test_noise_is_added_to_the_samples():
    """A point mass becomes N(0, noise_std^2 I): its bins are known."""
    point = np.array([0.75, 2.25])
    samples = np.tile(point, (200_000, 1))
    metrics = sample_metrics(samples, exact("checkerboard", 0.3), real("checkerboard"), 0.3, rng=5, num_bins=18)
    edges = np.linspace(-4.5, 4.5, 19)
    across, along = (np.diff(stats.norm(centre, 0.3).cdf(edges)) for centre in point)
    axis = np.arange(-4.5 + 1 / 64, 4.5, 1 / 32)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    cells = noisy_density_2d("checkerboard", points, 0.3).reshape(18, 16, 18, 16).sum(axis=(1, 3)) / 32**2
    expected = np.abs(np.outer(across, along) - cells).sum() / 2
    assert metrics.total_variation.value == pytest.approx(expected, abs=0.003)


def test_mass_outside_the_square_counts():
    samples = sample_2d_data("rings", 50_000, rng=1)
    odd = np.arange(len(samples))[:, None] % 2 == 1
    for far in (5.0, -1e6):  # beyond either edge
        metrics = sample_metrics(
            np.where(odd, samples, far), exact("rings", 0.1), real("rings"), 0.1, rng=2, num_bins=18
        )
        assert metrics.total_variation.value == pytest.approx(1 / 2, abs=0.02)
        assert metrics.total_variation.floor < 0.025  # wide bins are no excuse for a coarse quadrature
    metrics = sample_metrics(np.full((1000, 2), 100.0), exact("rings", 0.1), real("rings"), 0.1, rng=2)
    assert metrics.total_variation.value == pytest.approx(1)
    assert 20 < metrics.kl_divergence.value < np.inf


def test_sample_metrics_depend_on_rng_alone():
    samples = sample_2d_data("rings", 1000, rng=0)

    def measure(samples, rng=None):
        return sample_metrics(samples, exact("rings", 0.1), real("rings"), 0.1, rng)

    assert measure(samples, 1) == measure(samples.tolist(), np.random.default_rng(1))
    assert measure(samples, 1) != measure(samples, 2)
    assert measure(samples) != measure(samples)


@pytest.mark.parametrize("noise_std", [-0.1, np.nan, True, None])
def test_bad_noise_of_samples_is_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std must be a finite number of at least 0") as error:
        sample_metrics(np.zeros((5, 2)), exact("rings", 0.1), real("rings"), noise_std)
    assert repr(noise_std) in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda samples: sample_metrics(samples, exact("rings", 0.1), real("rings"), 0.1),
        lambda samples: sample_metrics(np.zeros((4, 2)), exact("rings", 0.1), lambda n, rng: samples, 0.1),
        lambda samples: sliced_wasserstein(samples, samples),
        lambda samples: sliced_wasserstein_to_data(samples, real("rings")),
        lambda samples: sliced_wasserstein_to_data(np.zeros((40, 2)), lambda n, rng: samples),
    ],
)
def test_bad_samples_are_refused(call):
    for shape in ((3,), (4, 3), (2, 2, 2)):
        with pytest.raises(
            ValueError, match=r"samples.* must have shape \(n, 2\)|sample_real must have shape"
        ) as error:
            call(np.zeros(shape))
        assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match="at least one point"):
        call(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"must be finite, got NaN, infinity .* in 2 of 4 points"):
        call([[0, 0], [np.nan, 0], [1, np.inf], [0, 1]])


@pytest.mark.parametrize("metric", [sample_metrics, sliced_wasserstein_to_data])
def test_too_few_real_samples_are_refused(metric):
    truth = {"exact_density": exact("rings", 0.1), "noise_std": 0.1} if metric is sample_metrics else {}
    with pytest.raises(ValueError, match=r"sample_real must return (30|3) samples, got 2"):
        metric(np.zeros((30, 2)), sample_real=lambda n, rng: np.zeros((2, 2)), **truth)


# --- Sliced Wasserstein ---


@pytest.mark.parametrize("shift", [[0.3, 0.0], [1.0, 1.0], [0.5, -0.5]])
def test_sliced_wasserstein_of_a_shift(shift):
    samples = sample_2d_data("2spirals", 1000, rng=0)
    shifted = samples + np.array(shift)
    length = np.hypot(*shift)
    # |shift| times the mean of |cos|.
    assert sliced_wasserstein(samples, shifted) == pytest.approx(2 / np.pi * length, rel=1e-3)
    assert sliced_wasserstein(samples, shifted, num_projections=1) == pytest.approx(abs(shift[0]), abs=1e-6)


def test_sliced_wasserstein_of_gaussians():
    """Projections of N(0, a^2 I) and N(0, b^2 I) are |a - b| sqrt(2 / pi) apart."""
    rng = np.random.default_rng(0)
    narrow, wide = rng.standard_normal((100_000, 2)), 1.5 * rng.standard_normal((100_000, 2))
    assert sliced_wasserstein(narrow, wide) == pytest.approx(0.5 * np.sqrt(2 / np.pi), rel=0.02)


def test_sliced_wasserstein_agrees_with_scipy():
    one, other = sample_2d_data("rings", 500, rng=0), sample_2d_data("2spirals", 500, rng=1)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    expected = np.mean(
        [
            stats.wasserstein_distance(*(samples @ [np.cos(angle), np.sin(angle)] for samples in (one, other)))
            for angle in angles
        ]
    )
    assert sliced_wasserstein(one, other, num_projections=4) == pytest.approx(expected, rel=1e-5)
    assert sliced_wasserstein(other, one, num_projections=4) == pytest.approx(expected, rel=1e-5)
    assert sliced_wasserstein(one, one[::-1]) == pytest.approx(0, abs=1e-6)  # the rounding of float32


def test_projections_are_enough():
    one, other = sample_2d_data("8gaussians", 50_000, rng=0), sample_2d_data("8gaussians", 50_000, rng=1)
    precise = sliced_wasserstein(one, other, num_projections=500)
    assert sliced_wasserstein(one, other) == pytest.approx(precise, rel=5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_projections": 0}, "num_projections must be .*0"),
        ({"num_projections": 2.5}, "num_projections must be .*2.5"),
        ({"num_projections": True}, "num_projections must be .*True"),
        ({"samples_b": np.zeros((6, 2))}, "equally many, got 5 and 6"),
    ],
)
def test_bad_sliced_wasserstein_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(**{"samples_a": np.zeros((5, 2)), "samples_b": np.zeros((5, 2)), **options})


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be .*0"),
        ({"samples": np.zeros((9, 2))}, "samples must be at least 10, got 9"),
    ],
)
def test_bad_sliced_wasserstein_to_data_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein_to_data(**{"samples": np.zeros((20, 2)), "sample_real": real("rings"), **options})


# --- Modes ---


def shares_of(dataset, samples):
    return mode_shares(distances_to_modes(dataset, samples))


def test_mode_shares_count_for_the_nearest_mode():
    counts = np.array([1, 2, 3, 4, 5, 6, 7, 0])
    distances = np.repeat(1.3 - np.eye(8), counts, axis=0)
    np.testing.assert_allclose(mode_shares(distances), counts / 28)
    np.testing.assert_allclose(shares_of("8gaussians", np.repeat(1.3 * GAUSSIAN_CENTRES, counts, axis=0)), counts / 28)
    np.testing.assert_allclose(shares_of("checkerboard", np.repeat(SQUARE_CORNERS + 1, counts, axis=0)), counts / 28)
    points = np.repeat(RING_RADII, [1, 2, 3, 4])[:, None] * [0.6, -0.8]
    np.testing.assert_allclose(shares_of("rings", 1.05 * points), [0.1, 0.2, 0.3, 0.4])


def test_unbalanced_modes_are_measured():
    wanted = np.array([1, 1, 1, 1, 1, 1, 1, 0.1])
    distances = distances_to_modes("8gaussians", gaussians_with_shares(wanted, 100_000, seed=1))
    np.testing.assert_allclose(mode_shares(distances), wanted / wanted.sum(), atol=0.005)


def test_bad_distances_are_refused():
    for distances, message in (
        (np.zeros(3), "distances must have shape"),
        (np.zeros((0, 3)), "at least one point"),
        ([[0.0, np.nan]], "distances must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            mode_shares(distances)
