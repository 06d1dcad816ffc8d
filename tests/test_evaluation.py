import numpy as np
import pytest
from scipy import stats

from egm_dde.evaluation import (
    density_metrics,
    label_coverage,
    mode_coverage,
    mode_shares,
    outside_support,
    results_row,
    sample_metrics,
    sliced_wasserstein,
    sliced_wasserstein_to_data,
)
from utils import (
    DATASETS,
    GAUSSIAN_CENTRES,
    GAUSSIAN_STD,
    RING_RADII,
    RING_STD,
    SQUARE_CORNERS,
    noisy_density_2d,
    sample_2d_data,
)

MODES = {"8gaussians": 8, "checkerboard": 8, "rings": 4}


def exact_log_density(dataset, noise_std):
    def log_density(points):
        with np.errstate(divide="ignore"):
            return np.log(noisy_density_2d(dataset, points, noise_std))

    return log_density


def gaussians_with_shares(shares, num_samples, seed):
    """Samples (num_samples, 2) of 8gaussians with other mode shares than 1/8."""
    rng = np.random.default_rng(seed)
    modes = rng.choice(8, size=num_samples, p=np.asarray(shares) / np.sum(shares))
    return GAUSSIAN_CENTRES[modes] + GAUSSIAN_STD * rng.standard_normal((num_samples, 2))


# --- Densities ---


@pytest.mark.parametrize("dataset", DATASETS)
def test_exact_density_scores_zero_whatever_its_constant(dataset):
    exact = exact_log_density(dataset, 0.1)
    metrics = density_metrics(lambda points: exact(points)[:, None] + 123.0, dataset, 0.1)
    assert metrics.total_variation == pytest.approx(0, abs=1e-6)
    assert metrics.kl_divergence == pytest.approx(0, abs=1e-9)


def test_density_metrics_of_densities_on_the_checkerboard():
    """Clean, it is uniform on half of [-4, 4]^2, and everything can be computed by hand."""

    def dark(points):
        return noisy_density_2d("checkerboard", points, 0) > 0

    def log_uniform(points):
        return np.where(np.abs(points).max(axis=1) < 4, 0.0, -np.inf)

    # The other direction of the divergence would be infinite.
    assert density_metrics(log_uniform, "checkerboard", 0) == pytest.approx((1 / 2, np.log(2)))

    def log_leaking(points):  # a fifth of the mass in the white squares, which have the same area
        return np.where(dark(points), np.log(0.8), np.log(0.2)) + log_uniform(points)

    assert density_metrics(log_leaking, "checkerboard", 0) == pytest.approx((0.2, -np.log(0.8)))

    def log_lopsided(points):  # three times as much on the right as on the left
        return np.where(dark(points), np.where(points[:, 0] > 0, np.log(3), 0.0), -np.inf)

    expected = (1 / 4, -np.log(1 / 2) / 2 - np.log(3 / 2) / 2)
    assert density_metrics(log_lopsided, "checkerboard", 0) == pytest.approx(expected)

    def log_missing(points):
        return np.where(dark(points) & (points[:, 0] > -2), 0.0, -np.inf)

    assert density_metrics(log_missing, "checkerboard", 0) == pytest.approx((1 / 4, np.inf))


@pytest.mark.parametrize("noise_std", [0.1, 0.5])
def test_divergence_of_a_tilted_density(noise_std):
    """For q~ proportional to p~ exp(tilt x), KL(p~ || q~) is the log of the moment-generating function."""
    tilt = np.array([0.5, -0.3])
    variance = GAUSSIAN_STD**2 + noise_std**2
    expected = np.log(np.mean(np.exp(GAUSSIAN_CENTRES @ tilt))) + tilt @ tilt * variance / 2

    exact = exact_log_density("8gaussians", noise_std)
    metrics = density_metrics(lambda points: exact(points) + points @ tilt, "8gaussians", noise_std, limit=7)
    assert metrics.kl_divergence == pytest.approx(expected, rel=1e-5)


def test_density_metrics_see_noise_of_another_level():
    def variation(model_noise, **options):
        return density_metrics(exact_log_density("8gaussians", model_noise), "8gaussians", 0.1, **options)

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
        density_metrics(exact_log_density(dataset, 0.13), dataset, 0.1, cell_width=cell_width)
        for cell_width in (0.1, 0.025)
    )
    assert coarse == pytest.approx(fine, abs=1e-4)
    assert fine.total_variation > 0.01


def test_divergence_survives_underflow():
    metrics = density_metrics(lambda points: -1e4 * (points**2).sum(axis=1), "rings", 0.1)
    assert metrics.total_variation == pytest.approx(1, abs=0.01)
    assert 1e4 < metrics.kl_divergence < 1e5


def test_log_density_is_called_once_with_points_of_the_square():
    calls = []

    def log_density(points):
        calls.append(points)
        return np.zeros(len(points), np.float32)

    density_metrics(log_density, "rings", 0.1, limit=5, cell_width=0.25)
    (points,) = calls
    assert points.dtype == np.float32
    assert points.shape == (80 * 80, 2)
    assert 4.8 < points.max() < 5
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_log_densities_that_are_not_numbers_are_refused(value):
    def log_density(points):
        return np.append(np.zeros(len(points) - 1), value)

    with pytest.raises(ValueError, match="finite numbers or minus infinity"):
        density_metrics(log_density, "rings", 0.1)


@pytest.mark.parametrize("shape", [(32400, 2), (32399,), (1, 32400), ()])
def test_log_densities_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="must return shape") as error:
        density_metrics(lambda points: np.zeros(shape), "rings", 0.1)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda width, **options: density_metrics(lambda points: points[:, 0], cell_width=width, **options),
        lambda width, **options: sample_metrics(np.zeros((5, 2)), bin_width=width, **options),
    ],
    ids=["density", "samples"],
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "moons"}, "dataset must be one of .*'moons'"),
        ({"noise_std": -0.1}, "noise_std must be .*-0.1"),
        ({"noise_std": np.nan}, "noise_std must be .*nan"),
        ({"noise_std": True}, "noise_std must be .*True"),
        ({"limit": 0}, "limit must be .*0"),
        ({"limit": np.nan}, "limit must be .*nan"),
        ({"limit": "4"}, "limit must be .*'4'"),
        ({"width": -0.1}, "width must be .*-0.1"),
        ({"width": np.inf}, "width must be .*inf"),
        ({"width": True}, "width must be .*True"),
        ({"width": 0.7}, "width must cut the side 9.0 into equal parts, got 0.7"),
        ({"width": 20.0}, "width must cut the side 9.0 into equal parts, got 20.0"),
    ],
)
def test_bad_settings_are_refused(call, changes, message):
    with pytest.raises(ValueError, match=message):
        call(**{"dataset": "rings", "noise_std": 0.1, "limit": 4.5, "width": 0.1, **changes})


@pytest.mark.parametrize(("noise_std", "limit"), [(0.1, 2.0), (1.0, 4.5)])
def test_squares_that_miss_the_mass_are_refused(noise_std, limit):
    exact = exact_log_density("8gaussians", noise_std)
    with pytest.raises(ValueError, match=f"limit={limit} and .*take a larger limit"):
        density_metrics(exact, "8gaussians", noise_std, limit=limit)
    assert density_metrics(exact, "8gaussians", noise_std, limit=8).total_variation < 1e-6


# --- Samples in bins ---


def test_floor_of_two_million_samples():
    metrics = sample_metrics(sample_2d_data("2spirals", 2_000_000, rng=1), "2spirals", 0.1, rng=2)
    assert metrics.total_variation.floor == pytest.approx(0.0135, abs=0.0005)
    assert metrics.total_variation.value == pytest.approx(metrics.total_variation.floor, rel=0.05)
    assert metrics.kl_divergence.value == pytest.approx(metrics.kl_divergence.floor, rel=0.1)


@pytest.mark.parametrize("dataset", ["8gaussians", "checkerboard", "rings"])
@pytest.mark.parametrize("noise_std", [0.1, 0.5])
def test_real_samples_score_the_floor_and_it_is_the_expected_one(dataset, noise_std):
    num_samples = 100_000
    samples = sample_2d_data(dataset, num_samples, rng=1)
    metrics = sample_metrics(samples, dataset, noise_std, rng=2, limit=5, bin_width=0.25)

    # The mean absolute deviation of every bin's binomial count (de Moivre), from a finer grid.
    axis = np.arange(-5 + 1 / 64, 5, 1 / 32)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    cells = noisy_density_2d(dataset, points, noise_std).reshape(40, 8, 40, 8) / 32**2
    probabilities = cells.sum(axis=(1, 3)).ravel()
    probabilities = np.append(probabilities, max(0, 1 - probabilities.sum()))
    next_count = np.floor(num_samples * probabilities) + 1
    deviations = 2 * next_count * (1 - probabilities) * stats.binom.pmf(next_count, num_samples, probabilities)
    expected = deviations.sum() / num_samples / 2

    assert metrics.total_variation == pytest.approx((expected, expected), rel=0.12)
    assert 0 < metrics.kl_divergence.value < 0.01
    assert metrics.kl_divergence.value == pytest.approx(metrics.kl_divergence.floor, rel=0.3)


def test_a_dropped_mode_costs_its_mass():
    samples = gaussians_with_shares([0, 1, 1, 1, 1, 1, 1, 1], 200_000, seed=3)
    metrics = sample_metrics(samples, "8gaussians", 0.1, rng=4, bin_width=0.5)
    assert metrics.total_variation.value == pytest.approx(1 / 8, abs=0.005)
    assert metrics.total_variation.floor < 0.015
    # KL(q || p) = log(8 / 7); the other direction would be infinite.
    assert metrics.kl_divergence.value == pytest.approx(np.log(8 / 7), abs=0.005)
    assert metrics.kl_divergence.floor < 0.002


def test_noise_is_added_to_the_samples():
    """A point mass becomes N(0, noise_std^2 I): its bins are known."""
    point = np.array([0.75, 2.25])
    samples = np.tile(point, (200_000, 1))
    metrics = sample_metrics(samples, "checkerboard", 0.3, rng=5, bin_width=0.5)
    edges = np.linspace(-4.5, 4.5, 19)
    across, along = (np.diff(stats.norm(centre, 0.3).cdf(edges)) for centre in point)
    axis = np.arange(-4.5 + 1 / 64, 4.5, 1 / 32)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    exact = noisy_density_2d("checkerboard", points, 0.3).reshape(18, 16, 18, 16).sum(axis=(1, 3)) / 32**2
    expected = np.abs(np.outer(across, along) - exact).sum() / 2
    assert metrics.total_variation.value == pytest.approx(expected, abs=0.003)


def test_mass_outside_the_square_counts():
    samples = sample_2d_data("rings", 50_000, rng=1)
    odd = np.arange(len(samples))[:, None] % 2 == 1
    for far in (5.0, -1e6):  # beyond either edge
        metrics = sample_metrics(np.where(odd, samples, far), "rings", 0.1, rng=2, bin_width=0.5)
        assert metrics.total_variation.value == pytest.approx(1 / 2, abs=0.02)
        assert metrics.total_variation.floor < 0.025  # wide bins are no excuse for a coarse quadrature
    metrics = sample_metrics(np.full((1000, 2), 100.0), "rings", 0.1, rng=2)
    assert metrics.total_variation.value == pytest.approx(1)
    assert 20 < metrics.kl_divergence.value < np.inf


def test_sample_metrics_depend_on_rng_alone():
    samples = sample_2d_data("rings", 1000, rng=0)
    metrics = sample_metrics(samples, "rings", 0.1, rng=1)
    assert metrics == sample_metrics(samples.tolist(), "rings", 0.1, rng=np.random.default_rng(1))
    assert metrics != sample_metrics(samples, "rings", 0.1, rng=2)
    assert sample_metrics(samples, "rings", 0.1) != sample_metrics(samples, "rings", 0.1)


@pytest.mark.parametrize(
    "call",
    [
        lambda samples: sample_metrics(samples, "rings", 0.1),
        lambda samples: sliced_wasserstein(samples, samples),
        lambda samples: sliced_wasserstein_to_data(samples, "rings"),
        lambda samples: mode_shares(samples, "rings"),
        lambda samples: mode_coverage(samples, "rings"),
        lambda samples: outside_support(samples, "rings"),
        lambda samples: results_row(exact_log_density("rings", 0.1), lambda n: samples, "rings", 0.1),
    ],
)
def test_bad_samples_are_refused(call):
    for shape in ((3,), (4, 3), (0, 2), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"samples must have shape \(n, 2\)") as error:
            call(np.zeros(shape))
        assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match="samples must be finite, got NaN or infinity in 2 of 4 rows"):
        call([[0, 0], [np.nan, 0], [1, np.inf], [0, 1]])


# --- Sliced Wasserstein ---


@pytest.mark.parametrize("shift", [[0.3, 0.0], [1.0, 1.0], [0.5, -0.5]])
def test_sliced_wasserstein_of_a_shift(shift):
    samples = sample_2d_data("2spirals", 1000, rng=0)
    shifted = samples + np.array(shift)
    length = np.hypot(*shift)
    # |shift| times the mean of |cos|, and the root of the mean of cos^2.
    assert sliced_wasserstein(samples, shifted) == pytest.approx(2 / np.pi * length, rel=1e-3)
    assert sliced_wasserstein(samples, shifted, order=2) == pytest.approx(length / np.sqrt(2), rel=1e-4)
    assert sliced_wasserstein(samples, shifted, num_projections=1) == pytest.approx(abs(shift[0]), abs=1e-6)


def test_sliced_wasserstein_of_gaussians():
    """Projections of N(0, a^2 I) and N(0, b^2 I) are |a - b| sqrt(2 / pi) apart, |a - b| in order 2."""
    rng = np.random.default_rng(0)
    narrow, wide = rng.standard_normal((100_000, 2)), 1.5 * rng.standard_normal((100_000, 2))
    assert sliced_wasserstein(narrow, wide) == pytest.approx(0.5 * np.sqrt(2 / np.pi), rel=0.02)
    assert sliced_wasserstein(narrow, wide, order=2) == pytest.approx(0.5, rel=0.02)


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
    assert sliced_wasserstein(one, one[::-1]) == 0


def test_projections_are_enough():
    one, other = sample_2d_data("8gaussians", 50_000, rng=0), sample_2d_data("8gaussians", 50_000, rng=1)
    precise = sliced_wasserstein(one, other, num_projections=500)
    assert sliced_wasserstein(one, other) == pytest.approx(precise, rel=5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"order": 0}, "order must be 1 or 2, got 0"),
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
    value, floor = sliced_wasserstein_to_data(samples, dataset, rng=2, num_projections=16, block_size=2000)
    assert value == pytest.approx(floor, rel=0.2)
    assert 0.03 < floor < 0.1
    moved, same_floor = sliced_wasserstein_to_data(samples + 0.5, dataset, 2, num_projections=16, block_size=2000)
    assert same_floor == floor  # it does not depend on the generated samples
    assert moved == pytest.approx(2 / np.pi * np.hypot(0.5, 0.5), rel=0.05)


def test_sliced_wasserstein_floor_falls_with_the_block_size():
    samples = sample_2d_data("rings", 64_000, rng=1)
    floors = [
        sliced_wasserstein_to_data(samples, "rings", rng=2, num_projections=16, block_size=size).floor
        for size in (1000, 4000)
    ]
    assert floors[0] / floors[1] == pytest.approx(2, rel=0.15)
    few = samples[:300]
    assert sliced_wasserstein_to_data(few, "rings", rng=3) == sliced_wasserstein_to_data(
        few, "rings", rng=3, block_size=300
    )
    # A remainder is left out.
    assert sliced_wasserstein_to_data(few, "rings", rng=3, block_size=200) == sliced_wasserstein_to_data(
        few[:200], "rings", rng=3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be .*0"),
        ({"num_projections": -1}, "num_projections must be .*-1"),
        ({"dataset": "moons"}, "dataset must be .*'moons'"),
    ],
)
def test_bad_sliced_wasserstein_to_data_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein_to_data(np.zeros((5, 2)), **{"dataset": "rings", **options})


# --- Modes and support ---


@pytest.mark.parametrize("dataset", MODES)
def test_real_samples_fill_all_modes_evenly(dataset):
    samples = sample_2d_data(dataset, 200_000, rng=1)
    shares = mode_shares(samples, dataset)
    assert shares.shape == (MODES[dataset],)
    assert shares.sum() == pytest.approx(1)
    assert stats.chisquare(shares * len(samples)).pvalue > 1e-3
    assert mode_coverage(samples, dataset) == 1
    assert outside_support(samples, dataset) <= 2e-5
    noisy = samples + np.random.default_rng(2).normal(0, 0.3, samples.shape)
    assert outside_support(noisy, dataset, noise_std=0.3) <= 2e-5


def test_mode_shares_count_for_the_nearest_mode():
    counts = np.array([1, 2, 3, 4, 5, 6, 7, 0])
    samples = np.repeat(GAUSSIAN_CENTRES, counts, axis=0) * 1.3
    np.testing.assert_allclose(mode_shares(samples, "8gaussians"), counts / 28)
    # Half of the true share is 1.75 of the 28.
    assert mode_coverage(samples, "8gaussians") == 6 / 8

    samples = np.repeat(SQUARE_CORNERS, counts, axis=0) + np.array([0.1, 1.9])
    np.testing.assert_allclose(mode_shares(samples, "checkerboard"), counts / 28)

    angles = np.arange(10)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    samples = np.repeat(RING_RADII, [1, 2, 3, 4])[:, None] * 1.05 * circle
    np.testing.assert_allclose(mode_shares(samples, "rings"), [0.1, 0.2, 0.3, 0.4])


def test_unbalanced_modes_are_measured():
    wanted = np.array([1, 1, 1, 1, 1, 1, 1, 0.1])
    samples = gaussians_with_shares(wanted, 100_000, seed=1)
    np.testing.assert_allclose(mode_shares(samples, "8gaussians"), wanted / wanted.sum(), atol=0.005)
    assert mode_coverage(samples, "8gaussians") == 7 / 8


def test_rings_keep_their_share_under_the_nearest_radius():
    radii = np.linspace(0, 4, 8001)
    density = noisy_density_2d("rings", np.stack([radii, np.zeros_like(radii)], axis=1), 0)
    mass = np.cumsum(2 * np.pi * radii * density) * (radii[1] - radii[0])
    borders = np.searchsorted(radii, [1.125, 1.875, 2.625])
    np.testing.assert_allclose(np.diff([0, *mass[borders], mass[-1]]), 1 / 4, atol=3e-6)


def test_points_outside_the_support_are_counted():
    axis = np.arange(-4.5 + 1 / 32, 4.5, 1 / 16)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert outside_support(grid, "checkerboard") == pytest.approx(1 - 32 / 81)
    assert outside_support(SQUARE_CORNERS, "checkerboard") == 0
    # With noise the squares grow by five of its standard deviations.
    assert outside_support([[4.4, 3.0], [4.6, 3.0], [4.4, 4.4]], "checkerboard", 0.1) == pytest.approx(2 / 3)

    for noise_std in (0.0, 0.2):
        reach = 5 * np.hypot(GAUSSIAN_STD, noise_std)
        outwards = GAUSSIAN_CENTRES / np.linalg.norm(GAUSSIAN_CENTRES, axis=1, keepdims=True)
        points = np.concatenate([GAUSSIAN_CENTRES + factor * reach * outwards for factor in (0.99, 1.01)])
        assert outside_support(points, "8gaussians", noise_std) == pytest.approx(1 / 2)
        reach = 5 * np.hypot(RING_STD, noise_std)
        points = [[0, 3 + 0.99 * reach], [0, -3 - 1.01 * reach]]
        assert outside_support(points, "rings", noise_std) == pytest.approx(1 / 2)
    assert outside_support([[0, 0], [0.75, 0], [1.1, 0], [9, 9]], "rings") == pytest.approx(1 / 2)


@pytest.mark.parametrize("metric", [mode_shares, mode_coverage, outside_support])
@pytest.mark.parametrize("dataset", ["2spirals", "moons", None, ["rings"]])
def test_distributions_without_modes_are_refused(metric, dataset):
    with pytest.raises(ValueError, match="8gaussians, checkerboard, rings; got") as error:
        metric(np.zeros((5, 2)), dataset)
    assert repr(dataset) in str(error.value)


@pytest.mark.parametrize("noise_std", [-0.1, np.nan, np.inf, "0", True])
def test_bad_noise_of_the_support_is_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std must be a finite number of at least 0") as error:
        outside_support(np.zeros((5, 2)), "rings", noise_std)
    assert repr(noise_std) in str(error.value)


# --- The row of a results table ---


def row_of(dataset, sampler=None, model_noise=0.1):
    return results_row(
        exact_log_density(dataset, model_noise),
        sampler or (lambda n: sample_2d_data(dataset, n, rng=1)),
        dataset,
        0.1,
        rng=2,
        num_samples=100_000,
    )


@pytest.mark.parametrize("dataset", DATASETS)
def test_row_of_a_perfect_model(dataset):
    row = row_of(dataset)
    assert all(isinstance(value, float) for value in row.values())
    assert row["density_tv"] < 1e-6 and abs(row["density_kl"]) < 1e-9
    for name in ("generator_tv", "generator_kl"):
        assert row[name] == pytest.approx(row[f"{name}_floor"], rel=0.1)
    assert row["sliced_wasserstein"] == pytest.approx(row["sliced_wasserstein_floor"], rel=0.7)
    modes = [row[name] for name in ("smallest_mode_share", "largest_mode_share", "mode_coverage", "outside_support")]
    if dataset == "2spirals":
        assert np.isnan(modes).all()
    else:
        share = 1 / MODES[dataset]
        assert modes == pytest.approx([share, share, 1, 0], abs=0.005)
        assert modes[0] < share < modes[1]


def test_row_of_a_bad_model():
    """One that overestimates the blur and drops a mode."""
    perfect = row_of("8gaussians")
    samples = gaussians_with_shares([1, 1, 0, 1, 1, 1, 1, 1], 100_000, seed=1)
    row = row_of("8gaussians", lambda n: samples[:n], model_noise=0.2)
    binned = sample_metrics(samples, "8gaussians", 0.1, rng=2)
    assert (row["generator_tv"], row["generator_tv_floor"]) == binned.total_variation
    assert (row["generator_kl"], row["generator_kl_floor"]) == binned.kl_divergence
    assert row["density_tv"] > 0.04 and row["density_kl"] > 0.003
    assert row["generator_tv"] > 1.5 * perfect["generator_tv"]
    assert row["generator_kl"] > 0.1
    assert row["sliced_wasserstein"] > 5 * row["sliced_wasserstein_floor"]
    assert row["smallest_mode_share"] == pytest.approx(0, abs=0.002)
    assert row["largest_mode_share"] == pytest.approx(1 / 7, abs=0.005)
    assert row["mode_coverage"] == 7 / 8


def test_bad_samplers_are_refused():
    with pytest.raises(ValueError, match="sampler must return 100000 samples, got 7"):
        row_of("rings", lambda n: np.zeros((7, 2)))
    with pytest.raises(ValueError, match=r"num_samples must be .*0"):
        results_row(exact_log_density("rings", 0.1), lambda n: np.zeros((n, 2)), "rings", 0.1, num_samples=0)


# --- Labels ---


def test_label_coverage_is_the_reverse_kl_divergence():
    probabilities = np.array([0.5, 0.25, 0.25, 0.0])
    covered, divergence = label_coverage([0, 0, 0, 1], probabilities)
    assert covered == 2
    np.testing.assert_allclose(divergence, stats.entropy([0.75, 0.25, 0], [0.5, 0.25, 0.25]))
    assert label_coverage([0, 1, 2, 0], probabilities) == (3, 0.0)
    assert label_coverage([0, 3], probabilities) == (2, np.inf)


def test_label_coverage_of_a_thousand_right_labels_is_its_floor():
    labels = np.random.default_rng(0).integers(1000, size=26_000)
    covered, divergence = label_coverage(labels, np.full(1000, 1e-3))
    assert covered == 1000
    np.testing.assert_allclose(divergence, 999 / 52_000, rtol=0.2)


def test_bad_labels_are_refused():
    half = [0.5, 0.5]
    for labels, message in (
        ([0, 2], "labels must be from 0 to 1, got 0 to 2"),
        ([-1, 0], "labels must be from 0 to 1, got -1 to 0"),
        ([0.0, 1.0], "labels must be integers .*, got float64"),
        ([], "labels must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            label_coverage(labels, half)
    for probabilities in ([0.5, 0.4], [1.5, -0.5], [[1.0]]):
        with pytest.raises(ValueError, match="that sum to 1"):
            label_coverage([0], probabilities)
