"""How close a model is to the truth: density and sample metrics against the exact toy distributions.

NumPy and SciPy only: a model comes in as a callable, or as an array of its samples. Below, p~ is the exact
density of ``data + N(0, noise_std^2 I)``, from ``utils.noisy_density_2d``, and q~ is the model's.

* ``density_metrics``: a log density known up to a constant, normalised on a square.
* ``sample_metrics``: generated samples with noise added, counted in bins.
* ``sliced_wasserstein_to_data``: generated samples against real ones, both clean.
* ``mode_shares``, ``mode_coverage``, ``outside_support``: where the generated samples lie.
* ``label_coverage``: what a classifier says that they are.
* ``results_row``: all of them at once, one row of a results table.

A number made from samples comes as ``Measured(value, floor)``. The floor is what real samples of the same
size score: a perfect generator reaches it, and goes below it by chance only.
"""

import functools
import numbers
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, rel_entr

from utils import (
    GAUSSIAN_CENTRES,
    GAUSSIAN_STD,
    RING_RADII,
    RING_STD,
    SQUARE_CORNERS,
    SQUARE_SIZE,
    noisy_density_2d,
    sample_2d_data,
)

# The distributions with modes (centres, circles, dark squares): standard deviation of the data around a mode.
_MODE_STDS = {"8gaussians": GAUSSIAN_STD, "checkerboard": 0.0, "rings": RING_STD}

# The probability outside the square is 1 minus that of the bins, so rounding hides anything below about this.
_SMALLEST_OUTSIDE_PROBABILITY = 1e-12


class Measured(NamedTuple):
    """A number computed from samples, and the same number for real samples of the same size."""

    value: float
    floor: float


class DensityMetrics(NamedTuple):
    """Distances of a density from the exact one: total variation in [0, 1], KL divergence in nats."""

    total_variation: float
    kl_divergence: float


class SampleMetrics(NamedTuple):
    """Distances of binned samples from the exact bin probabilities: total variation in [0, 1], KL in nats."""

    total_variation: Measured
    kl_divergence: Measured


def density_metrics(log_density, dataset, noise_std, limit=4.5, cell_width=0.1):
    """Compare a density that is known up to a constant with the exact noisy density.

    Total variation is ``1/2 integral |p~ - q~|``; the KL divergence is
    ``KL(p~ || q~) = integral p~ log(p~ / q~)``. Both densities are normalised on the square
    [-limit, limit]^2: what either has outside does not count, and a square without 99 % of the exact mass is
    refused. The quadrature has two Gauss-Legendre points per cell and axis; at the defaults and a noise of
    0.1 it is off by less than 1e-4 in both numbers.

    Args:
        log_density: callable, float32 points (n, 2) -> log density (n,) or (n, 1), up to a constant; called
            once, with n = (4 limit / cell_width)^2 points: 32,400 at the defaults.
        dataset: one of ``utils.DATASETS``.
        noise_std: standard deviation of the noise, in data units.
        limit: half the side of the square, in data units.
        cell_width: side of a cell of the quadrature, in data units; a whole number of cells fills the square.

    Returns:
        ``DensityMetrics(total_variation, kl_divergence)``. The divergence is infinite where the model gives
        minus infinity and there are data.

    Raises:
        ValueError: for a ``dataset`` or ``noise_std`` that ``utils.noisy_density_2d`` refuses, a ``limit`` or
            ``cell_width`` that is not positive, does not fit or loses mass, or a ``log_density`` that returns
            another shape, NaN or plus infinity.
    """
    num_cells = _count_intervals(limit, "cell_width", cell_width)
    points, exact = _exact_probabilities(dataset, noise_std, limit, num_cells)
    mass = exact.sum()
    if not 0.99 <= mass <= 1.01:
        raise ValueError(
            f"limit={limit!r} and cell_width={cell_width!r} give {dataset} at noise_std={noise_std!r} a mass "
            f"of {mass:.4f}; allowed is 0.99 to 1.01: take a larger limit or a smaller cell_width"
        )
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
    return DensityMetrics(float(np.abs(exact - np.exp(log_model)).sum() / 2), float(kl_divergence))


def sample_metrics(samples, dataset, noise_std, rng=None, limit=4.5, bin_width=0.1):
    """Compare generated samples, noise added and binned, with the exact noisy density.

    The noisy samples are counted in square bins on [-limit, limit]^2; everything outside is one more bin.
    With the shares q and the exact probabilities p of the bins, total variation is ``1/2 sum |q - p|`` and
    the KL divergence is ``KL(q || p) = sum q log(q / p)``, the direction in which a generator is trained
    (arXiv:2001.02728) and in which empty bins do no harm. Both are blind to what happens within a bin, and
    both have a floor that falls with the number of samples: 0.014 to 0.018 and about 0.001 nats for
    2,000,000 at the defaults and a noise of 0.1.

    The exact probabilities are integrals of the density over the bins, two Gauss-Legendre points per axis for
    every 0.1 data units; their error is below 1e-4 in total variation at a noise of 0.1.

    Args:
        samples: clean generated samples (n, 2), in data units.
        dataset: one of ``utils.DATASETS``.
        noise_std: standard deviation of the noise, in data units.
        rng: a ``numpy.random.Generator``, an integer seed, or None; for the noise and the real samples.
        limit: half the side of the square, in data units.
        bin_width: side of a bin, in data units; a whole number of bins fills the square.

    Returns:
        ``SampleMetrics(total_variation, kl_divergence)``, each a ``Measured(value, floor)``.

    Raises:
        ValueError: for a ``dataset`` or ``noise_std`` that ``utils.noisy_density_2d`` refuses, a ``limit`` or
            ``bin_width`` that is not positive or does not fit, or ``samples`` of another shape or not finite.
    """
    samples = _check_samples(samples)
    rng = np.random.default_rng(rng)
    num_bins = _count_intervals(limit, "bin_width", bin_width)
    cells_per_bin = int(np.ceil(bin_width / 0.1 - 1e-6))
    _, exact = _exact_probabilities(dataset, noise_std, limit, num_bins * cells_per_bin)
    exact = exact.reshape(num_bins, 2 * cells_per_bin, num_bins, 2 * cells_per_bin).sum(axis=(1, 3))
    probabilities = np.append(exact, max(1 - exact.sum(), _SMALLEST_OUTSIDE_PROBABILITY))

    def compare(clean):
        noisy = clean + np.float32(noise_std) * rng.standard_normal(clean.shape, dtype=np.float32)
        counts, _, _ = np.histogram2d(*noisy.T, bins=num_bins, range=[[-limit, limit]] * 2)
        shares = np.append(counts, len(noisy) - counts.sum()) / len(noisy)
        return np.abs(shares - probabilities).sum() / 2, rel_entr(shares, probabilities).sum()

    values = compare(samples)
    floors = compare(sample_2d_data(dataset, len(samples), rng))
    return SampleMetrics(*(Measured(*map(float, pair)) for pair in zip(values, floors, strict=True)))


def sliced_wasserstein(samples_a, samples_b, num_projections=64, order=1):
    """Compute the sliced Wasserstein distance between two samples of the same size.

    It averages the Wasserstein distance of projections onto directions u (Bonneel et al. 2015), where
    sorting is optimal transport: ``(mean_u mean_i |sort(a u)_i - sort(b u)_i|^order)^(1 / order)``. The
    directions are equally spaced, not random: the distance is a smooth periodic function of the angle, for
    which equal spacing is far more accurate (64 such directions are off by 0.02 %, 64 random ones by 2 %).

    Args:
        samples_a: array (n, 2), in data units.
        samples_b: array (n, 2), in data units.
        num_projections: number of directions.
        order: order of the distance, 1 or 2.

    Returns:
        The distance, in data units.

    Raises:
        ValueError: for samples of another shape, not finite or not equally many, a ``num_projections`` that
            is not an integer of at least 1, or another ``order``.
    """
    samples_a, samples_b = _check_samples(samples_a), _check_samples(samples_b)
    if len(samples_a) != len(samples_b):
        raise ValueError(f"the two samples must be equally many, got {len(samples_a)} and {len(samples_b)}")
    _check_positive_integer("num_projections", num_projections)
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


def sliced_wasserstein_to_data(samples, dataset, rng=None, num_projections=64, block_size=50_000):
    """Compute the sliced Wasserstein-1 distance of generated samples from real ones, and its floor.

    The value compares a block of generated samples with as many real ones; the floor compares other real
    ones with these real ones, along the same directions. A single pair of samples scatters by 30 %, so
    value and floor are means over all the blocks that ``samples`` can be cut into: 2,000,000 samples give
    both to about 5 %. A remainder is left out.

    Args:
        samples: clean generated samples (n, 2), in data units, in random order.
        dataset: one of ``utils.DATASETS``.
        rng: a ``numpy.random.Generator``, an integer seed, or None; for the real samples.
        num_projections: number of directions, as in ``sliced_wasserstein``.
        block_size: number of samples compared at a time; the floor falls with its square root. If there are
            fewer ``samples``, they are one block.

    Returns:
        ``Measured(value, floor)``, in data units.

    Raises:
        ValueError: for an unknown ``dataset``, ``samples`` of another shape or not finite, or a
            ``num_projections`` or ``block_size`` that is not an integer of at least 1.
    """
    samples = _check_samples(samples)
    _check_positive_integer("block_size", block_size)
    rng = np.random.default_rng(rng)
    block_size = min(block_size, len(samples))
    values, floors = [], []
    for start in range(0, len(samples) - block_size + 1, block_size):
        real = sample_2d_data(dataset, block_size, rng)
        other_real = sample_2d_data(dataset, block_size, rng)
        values.append(sliced_wasserstein(samples[start : start + block_size], real, num_projections))
        floors.append(sliced_wasserstein(other_real, real, num_projections))
    return Measured(float(np.mean(values)), float(np.mean(floors)))


def mode_shares(samples, dataset):
    """Compute the share of the samples that each mode gets when every sample counts for the nearest mode.

    Modes are the Gaussians, the rings or the dark squares of the checkerboard. Their true shares are equal:
    1/8, 1/4 and 1/8 (for rings up to 2e-6, the chance that the blur carries a point over to the next ring).

    Args:
        samples: clean samples (n, 2), in data units.
        dataset: "8gaussians", "checkerboard" or "rings".

    Returns:
        float64 array (number of modes,) that sums to 1, in the order of ``utils.GAUSSIAN_CENTRES``,
        ``utils.SQUARE_CORNERS`` or ``utils.RING_RADII``.

    Raises:
        ValueError: for a ``dataset`` without modes, or ``samples`` of another shape or not finite.
    """
    distances = _distances_to_modes(samples, dataset)
    return np.bincount(distances.argmin(axis=1), minlength=distances.shape[1]) / len(distances)


def mode_coverage(samples, dataset):
    """Compute the share of the modes that get at least half their true share of the samples.

    Args:
        samples: clean samples (n, 2), in data units.
        dataset: "8gaussians", "checkerboard" or "rings".

    Returns:
        The share, in (0, 1]; 1 if no mode is missing.

    Raises:
        ValueError: for a ``dataset`` without modes, or ``samples`` of another shape or not finite.
    """
    shares = mode_shares(samples, dataset)
    return float(np.mean(shares >= 0.5 / len(shares)))


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


def outside_support(samples, dataset, noise_std=0.0):
    """Compute the share of the samples that lie where there are practically no data.

    That is farther from every mode than five standard deviations of data and noise together:
    ``5 sqrt(data_std^2 + noise_std^2)``. The data_std of the checkerboard is 0: without noise, the white
    squares and everything outside [-4, 4]^2 count. Of real samples, fewer than 5 in a million lie there.

    Args:
        samples: samples (n, 2), in data units.
        dataset: "8gaussians", "checkerboard" or "rings". Not "2spirals": hardly a point between its arms is
            that far from both.
        noise_std: standard deviation of the noise in ``samples``, in data units; 0 if they are clean.

    Returns:
        The share, in [0, 1].

    Raises:
        ValueError: for a ``dataset`` without modes, ``samples`` of another shape or not finite, or a
            ``noise_std`` that is negative or not finite.
    """
    if not _is_real(noise_std) or not 0 <= noise_std < np.inf:
        raise ValueError(f"noise_std must be a finite number of at least 0, got {noise_std!r}")
    distances = _distances_to_modes(samples, dataset)
    return float(np.mean(distances.min(axis=1) > 5 * np.hypot(_MODE_STDS[dataset], noise_std)))


def results_row(log_density, sampler, dataset, noise_std, rng=None, num_samples=2_000_000):
    """Compute every metric of a trained model: one row of a results table.

    Args:
        log_density: the model's log density of the noisy real data, a callable as in ``density_metrics``.
        sampler: callable, n -> clean generated samples (n, 2); called once, with ``num_samples``.
        dataset: one of ``utils.DATASETS``.
        noise_std: standard deviation of the noise, in data units.
        rng: a ``numpy.random.Generator``, an integer seed, or None.
        num_samples: number of generated samples.

    Returns:
        dict of floats: ``density_tv``, ``density_kl``; ``generator_tv``, ``generator_kl`` and
        ``sliced_wasserstein``, each followed by its ``..._floor``; ``smallest_mode_share``,
        ``largest_mode_share``, ``mode_coverage`` and ``outside_support``, which are NaN for a ``dataset``
        without modes.

    Raises:
        ValueError: as ``density_metrics`` and ``sample_metrics``, for a ``num_samples`` that is not an
            integer of at least 1, and for a ``sampler`` that returns another number of samples.
    """
    _check_positive_integer("num_samples", num_samples)
    rng = np.random.default_rng(rng)
    density = density_metrics(log_density, dataset, noise_std)
    samples = _check_samples(sampler(num_samples))
    if len(samples) != num_samples:
        raise ValueError(f"sampler must return {num_samples} samples, got {len(samples)}")
    binned = sample_metrics(samples, dataset, noise_std, rng)
    sliced = sliced_wasserstein_to_data(samples, dataset, rng)
    has_modes = dataset in _MODE_STDS
    shares = mode_shares(samples, dataset) if has_modes else np.array([np.nan])
    return {
        "density_tv": density.total_variation,
        "density_kl": density.kl_divergence,
        "generator_tv": binned.total_variation.value,
        "generator_tv_floor": binned.total_variation.floor,
        "generator_kl": binned.kl_divergence.value,
        "generator_kl_floor": binned.kl_divergence.floor,
        "sliced_wasserstein": sliced.value,
        "sliced_wasserstein_floor": sliced.floor,
        "smallest_mode_share": float(shares.min()),
        "largest_mode_share": float(shares.max()),
        "mode_coverage": mode_coverage(samples, dataset) if has_modes else np.nan,
        "outside_support": outside_support(samples, dataset) if has_modes else np.nan,
    }


@functools.lru_cache(maxsize=16, typed=True)  # 2spirals takes seconds
def _exact_probabilities(dataset, noise_std, limit, num_cells):
    """Return quadrature points (4 num_cells^2, 2), float32, and their exact probabilities (4 num_cells^2,).

    The points are in the order of a grid (2 num_cells, 2 num_cells) with x along the first axis.
    """
    cell_width = 2 * limit / num_cells
    centres = cell_width * (np.arange(num_cells) + 0.5) - limit
    offsets = cell_width / np.sqrt(12) * np.array([-1, 1])  # the two Gauss-Legendre points, of equal weight
    axis = np.ravel(centres[:, None] + offsets)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    probabilities = noisy_density_2d(dataset, points, noise_std) * (cell_width / 2) ** 2
    points = points.astype(np.float32)
    for array in (points, probabilities):
        array.setflags(write=False)  # every caller gets the same arrays
    return points, probabilities


def _count_intervals(limit, name, width):
    """Return how many intervals of a width fill [-limit, limit]."""
    for argument, value in (("limit", limit), (name, width)):
        if not _is_real(value) or not 0 < value < np.inf:
            raise ValueError(f"{argument} must be a finite number above 0, got {value!r}")
    count = round(2 * limit / width)
    if count < 1 or not np.isclose(count * width, 2 * limit):
        raise ValueError(f"{name} must cut the side {2 * limit!r} into equal parts, got {width!r}")
    return count


def _distances_to_modes(samples, dataset):
    """Return the distances (n, number of modes) of samples from the centres, circles or dark squares."""
    if not isinstance(dataset, str) or dataset not in _MODE_STDS:
        raise ValueError(f"dataset must be one with modes: {', '.join(_MODE_STDS)}; got {dataset!r}")
    samples = _check_samples(samples)
    if dataset == "8gaussians":
        return cdist(samples, GAUSSIAN_CENTRES)
    if dataset == "rings":
        return np.abs(np.linalg.norm(samples, axis=1, keepdims=True) - RING_RADII)
    half = SQUARE_SIZE / 2
    beyond = (np.maximum(np.abs(samples - (corner + half)) - half, 0) for corner in SQUARE_CORNERS)
    return np.stack([np.hypot(*axes.T) for axes in beyond], axis=1)


def _check_samples(samples):
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim != 2 or samples.shape[1] != 2 or len(samples) == 0:
        raise ValueError(f"samples must have shape (n, 2) with n of at least 1, got {samples.shape}")
    broken = np.count_nonzero(~np.isfinite(samples).all(axis=1))
    if broken:
        raise ValueError(f"samples must be finite, got NaN or infinity in {broken} of {len(samples)} rows")
    return samples


def _check_positive_integer(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _is_real(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
