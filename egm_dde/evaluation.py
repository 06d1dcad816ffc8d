"""How close a model is to the truth, for data in the plane whose density is known (NumPy and SciPy, no TensorFlow).

Model and truth come in as callables and arrays. Below, p~ is the exact density of data with noise, and q~ the model's:

* ``density_metrics``: a log density known up to a constant, normalised on a square.
* ``fisher_information``, ``minimum_denoising_loss``: what the loss of a perfect density estimator is.
* ``sample_metrics``: generated samples with noise added, counted in bins.
* ``sliced_wasserstein_to_data``: generated samples against real ones, both clean.
* ``mode_shares``, ``mode_coverage``, ``outside_support``: where generated samples lie.
* ``label_coverage``: what a classifier says that they are.
* ``results_row``: all of them at once, one row of a results table.

The truth about the toy data, for example, is

    exact_density = functools.partial(utils.noisy_density_2d, "rings", noise_std=0.1)
    sample_real = functools.partial(utils.sample_2d_data, "rings")
    distances = functools.partial(utils.distances_to_modes, "rings")

A number made from samples has a floor beside it. The floor is what real samples of the same size score: a perfect
generator reaches it, and goes below it by chance only.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, rel_entr

from egm_dde.checks import check_integer, check_interval, check_points, check_positive

# The probability outside the square is 1 minus that of the bins, so rounding hides anything below about this.
_SMALLEST_OUTSIDE_PROBABILITY = 1e-12

# A single pair of samples scatters by 30 %.
_SMALLEST_NUM_PAIRS = 10


class Measured(NamedTuple):
    """A number computed from samples, and the same number for real samples of the same size."""

    value: float
    floor: float


class DensityMetrics(NamedTuple):
    """Distances of a density from the exact one, and the grid that they were computed on.

    Attributes:
        total_variation: in [0, 1].
        kl_divergence: KL(p~ || q~), in nats.
        num_cells: number of cells of the square, all of them; the densities are evaluated at four points of each.
    """

    total_variation: float
    kl_divergence: float
    num_cells: int


class SampleMetrics(NamedTuple):
    """Distances of binned samples from the exact bin probabilities: total variation in [0, 1], KL(q || p) in nats."""

    total_variation: Measured
    kl_divergence: Measured


class SlicedWasserstein(NamedTuple):
    """A sliced Wasserstein distance from real samples and its floor, means over pairs of samples.

    Attributes:
        value: that of the generated samples, in data units.
        floor: that of other real samples, in data units.
        value_std_error: standard error of the value.
        floor_std_error: standard error of the floor.
        ratio: value / floor.
        ratio_std_error: standard error of the ratio; value and floor share real samples, so part of their errors
            cancels.
    """

    value: float
    floor: float
    value_std_error: float
    floor_std_error: float
    ratio: float
    ratio_std_error: float


# ---------------------------------------------------------------------------------------------- densities


def density_metrics(log_density, exact_density, limit=4.5, cell_width=0.1):
    """Compare a density that is known up to a constant with the exact one.

    Total variation is ``1/2 integral |p~ - q~|``; the KL divergence is ``KL(p~ || q~) = integral p~ log(p~ / q~)``.
    Both densities are normalised on the square [-limit, limit]^2: what either has outside does not count, and a square
    without 99 % of the exact mass is refused. The square has (2 limit / cell_width)^2 cells, 8,100 at the defaults. The
    quadrature has two Gauss-Legendre points per cell and axis; at the defaults and a noise of 0.1 it is off by less
    than 1e-4 in both numbers on the toy data.

    Args:
        log_density: callable, float32 points (n, 2) -> log density (n,) or (n, 1), up to a constant; called once, with
            four points a cell, n = 32,400 at the defaults.
        exact_density: callable, points (n, 2) -> exact density (n,), probability per unit area. Its values are kept for
            further calls with the same object.
        limit: half the side of the square, in data units.
        cell_width: side of a cell of the quadrature, in data units; a whole number of cells fills the square.

    Returns:
        ``DensityMetrics(total_variation, kl_divergence, num_cells)``. The divergence is infinite where the model gives
        minus infinity and there are data.

    Raises:
        ValueError: for a ``limit`` or ``cell_width`` that is not positive, does not fit or loses mass, or for a
            ``log_density`` or ``exact_density`` that returns another shape, NaN or plus infinity.
    """
    num_cells = _count_intervals(limit, "cell_width", cell_width)
    points, exact = _exact_probabilities(exact_density, float(limit), num_cells)
    mass = _check_mass(exact.sum(), limit, cell_width)
    log_model = np.asarray(log_density(points), dtype=np.float64)
    if log_model.shape not in {(len(points),), (len(points), 1)}:
        raise ValueError(f"log_density must return shape ({len(points)}, 1), got {log_model.shape}")
    if np.isnan(log_model).any() or np.isposinf(log_model).any():
        raise ValueError("log_density must return finite numbers or minus infinity, got NaN or infinity")

    # Every point has the same quadrature weight, so probabilities normalise like the entries of a softmax.
    log_model = log_model.ravel() - logsumexp(log_model)
    exact = exact / mass
    support = exact > 0
    # In logarithms: a model density that underflows must not make the divergence infinite.
    kl_divergence = (exact[support] * (np.log(exact[support]) - log_model[support])).sum()
    return DensityMetrics(float(np.abs(exact - np.exp(log_model)).sum() / 2), float(kl_divergence), num_cells**2)


def fisher_information(exact_density, limit=5.0, cell_width=0.05):
    """Compute the Fisher information J = E ||grad log p~||^2 = integral ||grad p~||^2 / p~ of a density.

    The sum runs over a grid. The gradient is taken by Fourier transform, which is exact to rounding for a density that
    is smooth on the scale of ``cell_width`` and practically zero at the border of the square.

    Args:
        exact_density: callable, points (n, 2) -> exact density (n,).
        limit: half the side of the square, in data units.
        cell_width: distance of grid points, in data units, at most the standard deviation of the noise; a whole number
            of cells fills the square.

    Returns:
        The Fisher information, in 1 / (squared data units).

    Raises:
        ValueError: for a ``limit`` or ``cell_width`` that is not positive, does not fit or loses mass, or for an
            ``exact_density`` that returns another shape or numbers that are no densities.
    """
    num_cells = _count_intervals(limit, "cell_width", cell_width)
    axis = cell_width * (np.arange(num_cells) + 0.5) - limit
    density = _evaluate_on_grid(exact_density, axis)
    _check_mass(density.sum() * cell_width**2, limit, cell_width)
    wave_numbers = 2 * np.pi * np.fft.fftfreq(num_cells, cell_width)
    # ||grad p~||^2 / p~ is 4 ||grad sqrt(p~)||^2, and the mean square of a derivative is that of its Fourier transform.
    power = np.abs(np.fft.fft2(np.sqrt(density))) ** 2 / num_cells**2
    return float(4 * np.sum(power * (wave_numbers[:, None] ** 2 + wave_numbers**2)) * cell_width**2)


def minimum_denoising_loss(exact_density, noise_std, limit=5.0, cell_width=0.05):
    """Compute the least denoising loss in noise units that any density estimator has: 1 - noise_std^2 J / 2.

    The loss is E ||s grad f(x + s n) + n||^2 / d with s = noise_std and d = 2 coordinates (arXiv:2001.02728, Eq. 5,
    times s^2 / d). Part of the noise cannot be known from the noisy point, so even f = log p~ leaves this much; what a
    model has above it, times d / s^2, is its Fisher divergence from p~.

    Args:
        exact_density: callable, points (n, 2) -> exact density (n,) of the data with noise.
        noise_std: standard deviation of the noise in it, in data units.
        limit: as in ``fisher_information``.
        cell_width: as in ``fisher_information``.

    Returns:
        The least loss, in [0, 1].

    Raises:
        ValueError: for a ``noise_std`` that is not positive, and as ``fisher_information``.
    """
    noise_std = check_positive("noise_std", noise_std)
    return 1 - noise_std**2 * fisher_information(exact_density, limit, cell_width) / 2


# ---------------------------------------------------------------------------------------------- samples


def sample_metrics(samples, exact_density, sample_real, noise_std, rng=None, limit=4.5, bin_width=0.1):
    """Compare generated samples, noise added and binned, with the exact density.

    The noisy samples are counted in square bins on [-limit, limit]^2; everything outside is one more bin. With the
    shares q and the exact probabilities p of the bins, total variation is ``1/2 sum |q - p|`` and the KL divergence is
    ``KL(q || p) = sum q log(q / p)``, the direction in which a generator is trained (arXiv:2001.02728) and in which
    empty bins do no harm. Both are blind to what happens within a bin, and both have a floor that falls with the number
    of
    samples: 0.014 to 0.018 and about 0.001 nats for 2,000,000 toy samples at the defaults and a noise of 0.1.

    The exact probabilities are integrals of the density over the bins, two Gauss-Legendre points per axis for every 0.1
    data units; their error is below 1e-4 in total variation at a noise of 0.1.

    Args:
        samples: clean generated samples (n, 2), in data units.
        exact_density: callable, points (n, 2) -> exact density (n,) of real samples with noise. Its values are kept for
            further calls with the same object.
        sample_real: callable, (n, rng) -> clean real samples (n, 2), for the floor.
        noise_std: standard deviation of the noise, in data units, at least 0.
        rng: a ``numpy.random.Generator``, an integer seed, or None; for the noise and the real samples.
        limit: half the side of the square, in data units.
        bin_width: side of a bin, in data units; a whole number of bins fills the square.

    Returns:
        ``SampleMetrics(total_variation, kl_divergence)``, each a ``Measured(value, floor)``.

    Raises:
        ValueError: for a ``noise_std`` out of range, a ``limit`` or ``bin_width`` that is not positive or does not fit,
            ``samples`` of another shape or not finite, or callables that return what is no density or no sample.
    """
    samples = _check_samples("samples", samples)
    noise_std = check_interval("noise_std", noise_std, 0)
    rng = np.random.default_rng(rng)
    num_bins = _count_intervals(limit, "bin_width", bin_width)
    cells_per_bin = int(np.ceil(bin_width / 0.1 - 1e-6))
    _, exact = _exact_probabilities(exact_density, float(limit), num_bins * cells_per_bin)
    exact = exact.reshape(num_bins, 2 * cells_per_bin, num_bins, 2 * cells_per_bin).sum(axis=(1, 3))
    probabilities = np.append(exact, max(1 - exact.sum(), _SMALLEST_OUTSIDE_PROBABILITY))

    def compare(clean):
        noisy = clean + np.float32(noise_std) * rng.standard_normal(clean.shape, dtype=np.float32)
        counts, _, _ = np.histogram2d(*noisy.T, bins=num_bins, range=[[-limit, limit]] * 2)
        shares = np.append(counts, len(noisy) - counts.sum()) / len(noisy)
        return np.abs(shares - probabilities).sum() / 2, rel_entr(shares, probabilities).sum()

    values = compare(samples)
    floors = compare(_draw("sample_real", sample_real, len(samples), rng))
    return SampleMetrics(*(Measured(*map(float, pair)) for pair in zip(values, floors, strict=True)))


def sliced_wasserstein(samples_a, samples_b, num_projections=64, order=1):
    """Compute the sliced Wasserstein distance between two samples of the same size.

    It averages the Wasserstein distance of projections onto directions u (Bonneel et al. 2015), where sorting is
    optimal
    transport: ``(mean_u mean_i |sort(a u)_i - sort(b u)_i|^order)^(1 / order)``. The directions are equally spaced, not
    random: the distance is a smooth periodic function of the angle, for which equal spacing is far more accurate (64
    such directions are off by 0.02 %, 64 random ones by 2 %).

    Args:
        samples_a: array (n, 2), in data units.
        samples_b: array (n, 2), in data units.
        num_projections: number of directions.
        order: order of the distance, 1 or 2.

    Returns:
        The distance, in data units.

    Raises:
        ValueError: for samples of another shape, not finite or not equally many, a ``num_projections`` that is not an
            integer of at least 1, or another ``order``.
    """
    samples_a, samples_b = _check_samples("samples_a", samples_a), _check_samples("samples_b", samples_b)
    if len(samples_a) != len(samples_b):
        raise ValueError(f"the two samples must be equally many, got {len(samples_a)} and {len(samples_b)}")
    num_projections = check_integer("num_projections", num_projections)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    angles = np.pi * np.arange(num_projections) / num_projections
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    # By hand: scipy.stats.wasserstein_distance has order 1 only and is 20 times slower, as it allows weights.
    costs = []
    for direction in directions:
        differences = np.sort(samples_a @ direction) - np.sort(samples_b @ direction)
        costs.append(np.mean(np.abs(differences) ** order, dtype=np.float64))
    return float(np.mean(costs) ** (1 / order))


def sliced_wasserstein_to_data(samples, sample_real, rng=None, num_projections=64, block_size=50_000):
    """Compute the sliced Wasserstein-1 distance of generated samples from real ones, its floor, and their spread.

    The value compares a block of generated samples with as many real ones; the floor compares other real ones with
    these real ones, along the same directions. A single pair of samples scatters by 30 %, so value and floor are means
    over at least ten pairs: over all the blocks that ``samples`` can be cut into. A remainder is left out. The floor
    falls with the square root of the size of a block, so only ratios from blocks of one size compare.

    Args:
        samples: clean generated samples (n, 2), in data units, in random order; ten at least.
        sample_real: callable, (n, rng) -> clean real samples (n, 2).
        rng: a ``numpy.random.Generator``, an integer seed, or None; for the real samples.
        num_projections: number of directions, as in ``sliced_wasserstein``.
        block_size: number of samples compared at a time, or a tenth of ``samples`` if that is less.

    Returns:
        ``SlicedWasserstein(value, floor, value_std_error, floor_std_error, ratio, ratio_std_error)``.

    Raises:
        ValueError: for ``samples`` of another shape, not finite or fewer than ten, a ``num_projections`` or
            ``block_size`` that is not an integer of at least 1, or a ``sample_real`` that returns no such sample.
    """
    samples = _check_samples("samples", samples)
    if len(samples) < _SMALLEST_NUM_PAIRS:
        raise ValueError(f"samples must be at least {_SMALLEST_NUM_PAIRS}, got {len(samples)}")
    block_size = min(check_integer("block_size", block_size), len(samples) // _SMALLEST_NUM_PAIRS)
    rng = np.random.default_rng(rng)
    pairs = []
    for start in range(0, len(samples) - block_size + 1, block_size):
        real, other_real = (_draw("sample_real", sample_real, block_size, rng) for _ in range(2))
        block = samples[start : start + block_size]
        pairs.append([sliced_wasserstein(each, real, num_projections) for each in (block, other_real)])
    values, floors = np.transpose(pairs)
    value, floor = values.mean(), floors.mean()
    ratio = value / floor

    def std_error(numbers):
        return numbers.std(ddof=1) / np.sqrt(len(numbers))

    # The error of the ratio is that of its linear approximation.
    errors = std_error(values), std_error(floors), std_error((values - ratio * floors) / floor)
    return SlicedWasserstein(*map(float, (value, floor, *errors[:2], ratio, errors[2])))


def mode_shares(distances):
    """Compute the share of the samples that each mode gets when every sample counts for the nearest mode.

    Args:
        distances: array (n, number of modes), how far each sample is from each mode.

    Returns:
        float64 array (number of modes,) that sums to 1.

    Raises:
        ValueError: for distances of another shape, negative or not finite.
    """
    distances = _check_distances(distances)
    return np.bincount(distances.argmin(axis=1), minlength=distances.shape[1]) / len(distances)


def mode_coverage(distances):
    """Compute the share of the modes, all of equal weight, that get at least half their true share of the samples.

    Args:
        distances: as in ``mode_shares``.

    Returns:
        The share, in (0, 1]; 1 if no mode is missing.

    Raises:
        ValueError: as ``mode_shares``.
    """
    shares = mode_shares(distances)
    return float(np.mean(shares >= 0.5 / len(shares)))


def outside_support(distances, mode_std):
    """Compute the share of the samples that lie where there are practically no data.

    That is farther from every mode than five standard deviations. Of samples that scatter around the modes like
    Gaussians with this standard deviation, fewer than 5 in a million lie there.

    Args:
        distances: as in ``mode_shares``.
        mode_std: standard deviation of the data around a mode, with noise if the samples have noise, in the unit of
            ``distances``; 0 counts all samples that are off the modes.

    Returns:
        The share, in [0, 1].

    Raises:
        ValueError: for a ``mode_std`` that is negative or not finite, and as ``mode_shares``.
    """
    reach = 5 * check_interval("mode_std", mode_std, 0)
    return float(np.mean(_check_distances(distances).min(axis=1) > reach))


def label_coverage(labels, probabilities):
    """Compare the labels that a classifier gives to generated samples with the probabilities of the labels.

    The measure of the Stacked MNIST literature (arXiv:1611.02163): of the shares q of the labels, how many are not
    zero, and the reverse KL divergence sum q log(q / p). Shares of n labels are random: n
    independent labels from p themselves have a divergence of about (number of labels - 1) / (2 n).

    Args:
        labels: integers (n,) from 0 on.
        probabilities: (number of labels,), those of the data.

    Returns:
        The number of labels that occur, and the KL divergence in nats; infinite if a label of probability 0 occurs.

    Raises:
        ValueError: for labels that are not such integers, or probabilities that do not sum to 1.
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


# ---------------------------------------------------------------------------------------------- tables


def results_row(
    log_density,
    sampler,
    exact_density,
    sample_real,
    noise_std,
    distances_to_modes=None,
    mode_std=0.0,
    rng=None,
    n_samples=2_000_000,
):
    """Compute every metric of a trained model: one row of a results table.

    Args:
        log_density: the model's log density of the noisy real data, a callable as in ``density_metrics``.
        sampler: callable, n -> clean generated samples (n, 2); called once, with ``n_samples``.
        exact_density: callable as in ``density_metrics``.
        sample_real: callable as in ``sample_metrics``.
        noise_std: standard deviation of the noise, in data units.
        distances_to_modes: callable, points (n, 2) -> distances (n, number of modes); None for data without modes.
        mode_std: standard deviation of the clean data around a mode, in data units.
        rng: a ``numpy.random.Generator``, an integer seed, or None.
        n_samples: number of generated samples.

    Returns:
        dict of floats: ``density_tv``, ``density_kl``; ``generator_tv``, ``generator_kl`` and ``sliced_wasserstein``,
        each followed by its ``..._floor``; ``sliced_wasserstein_std_error`` and ``..._floor_std_error``,
        ``sliced_wasserstein_ratio``, that of value and floor, and ``..._ratio_std_error``; ``smallest_mode_share``,
        ``largest_mode_share``, ``mode_coverage`` and ``outside_support``, which are NaN without ``distances_to_modes``.

    Raises:
        ValueError: as ``density_metrics``, ``sample_metrics`` and ``outside_support``, for an ``n_samples`` that is not
            an integer of at least 10, and for a ``sampler`` that returns another number of samples.
    """
    n_samples = check_integer("n_samples", n_samples, _SMALLEST_NUM_PAIRS)
    rng = np.random.default_rng(rng)
    density = density_metrics(log_density, exact_density)
    samples = _draw("sampler", sampler, n_samples)
    binned = sample_metrics(samples, exact_density, sample_real, noise_std, rng)
    sliced = sliced_wasserstein_to_data(samples, sample_real, rng)
    row = {
        "density_tv": density.total_variation,
        "density_kl": density.kl_divergence,
        "generator_tv": binned.total_variation.value,
        "generator_tv_floor": binned.total_variation.floor,
        "generator_kl": binned.kl_divergence.value,
        "generator_kl_floor": binned.kl_divergence.floor,
        "sliced_wasserstein": sliced.value,
        "sliced_wasserstein_floor": sliced.floor,
        "sliced_wasserstein_std_error": sliced.value_std_error,
        "sliced_wasserstein_floor_std_error": sliced.floor_std_error,
        "sliced_wasserstein_ratio": sliced.ratio,
        "sliced_wasserstein_ratio_std_error": sliced.ratio_std_error,
    }
    if distances_to_modes is None:
        return row | dict.fromkeys(
            ("smallest_mode_share", "largest_mode_share", "mode_coverage", "outside_support"), np.nan
        )
    distances = distances_to_modes(samples)
    shares = mode_shares(distances)
    return row | {
        "smallest_mode_share": float(shares.min()),
        "largest_mode_share": float(shares.max()),
        "mode_coverage": mode_coverage(distances),
        "outside_support": outside_support(distances, mode_std),
    }


# ---------------------------------------------------------------------------------------------- helpers


@functools.lru_cache(maxsize=16, typed=True)  # the two spirals take a second or more
def _exact_probabilities(exact_density, limit, num_cells):
    """Return quadrature points (4 num_cells^2, 2), float32, and their exact probabilities (4 num_cells^2,).

    The points are in the order of a grid (2 num_cells, 2 num_cells) with x along the first axis.
    """
    cell_width = 2 * limit / num_cells
    centres = cell_width * (np.arange(num_cells) + 0.5) - limit
    offsets = cell_width / np.sqrt(12) * np.array([-1, 1])  # the two Gauss-Legendre points, of equal weight
    axis = np.ravel(centres[:, None] + offsets)
    probabilities = _evaluate_on_grid(exact_density, axis).ravel() * (cell_width / 2) ** 2
    points = _grid_points(axis).astype(np.float32)
    for array in (points, probabilities):
        array.setflags(write=False)  # every caller gets the same arrays
    return points, probabilities


def _grid_points(axis):
    """Points (n^2, 2) of a grid with x along its first axis."""
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def _evaluate_on_grid(exact_density, axis):
    """Return the density (n, n) on a grid with x along its first axis."""
    points = _grid_points(axis)
    density = np.asarray(exact_density(points), dtype=np.float64)
    if density.shape != (len(points),):
        raise ValueError(f"exact_density must return shape ({len(points)},), got {density.shape}")
    if not (np.isfinite(density) & (density >= 0)).all():
        raise ValueError("exact_density must return finite numbers of at least 0, got others among them")
    return density.reshape(len(axis), len(axis))


def _check_mass(mass, limit, cell_width):
    if not 0.99 <= mass <= 1.01:
        raise ValueError(
            f"limit={limit!r} and cell_width={cell_width!r} give the exact density a mass of {mass:.4f}; allowed is "
            "0.99 to 1.01: take a larger limit or a smaller cell_width"
        )
    return mass


def _count_intervals(limit, name, width):
    """Return how many intervals of a width fill [-limit, limit]."""
    side = 2 * check_positive("limit", limit)
    count = round(side / check_positive(name, width))
    if count < 1 or not np.isclose(count * width, side):
        raise ValueError(f"{name} must cut the side {side!r} into equal parts, got {width!r}")
    return count


def _check_samples(name, samples):
    return check_points(name, samples, (2,), "float32")


def _check_distances(distances):
    distances = check_points("distances", distances, (None,), "float64")
    if distances.min() < 0:
        raise ValueError(f"distances must be at least 0, got {distances.min()}")
    return distances


def _draw(name, sampler, n_samples, *arguments):
    """Return the samples (n_samples, 2) that a callable draws."""
    samples = _check_samples(f"the values of {name}", sampler(n_samples, *arguments))
    if len(samples) != n_samples:
        raise ValueError(f"{name} must return {n_samples} samples, got {len(samples)}")
    return samples
