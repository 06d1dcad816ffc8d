"""How close a model is to the truth, for data in the plane whose density is known (NumPy and SciPy, no TensorFlow).

Model and truth come in as callables and arrays; p~ is the exact density of data with noise, and q~ the model's. For the
toy data, the truth is

    exact_density = functools.partial(utils.noisy_density_2d, "rings", noise_std=0.1)
    sample_real = functools.partial(utils.sample_2d_data, "rings")
    distances_to_modes = functools.partial(utils.distances_to_modes, "rings")

A number made from samples has a floor beside it: what real samples of the same size score. A perfect generator reaches
it, and goes below it by chance only. All functions raise ValueError for arguments that are not as described, but for
``rng``, which NumPy checks.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, rel_entr

from egm_dde.checks import check_integer, check_interval, check_points, check_positive, log_densities

SMALLEST_OUTSIDE_PROBABILITY = 1e-12  # 1 minus the probability of the bins; rounding hides what is below
SMALLEST_NUM_PAIRS = 10  # of samples: the sliced Wasserstein distance of a single pair scatters by 30 %


class Measured(NamedTuple):
    """A number computed from samples, and the same number for real samples of the same size."""

    value: float
    floor: float


class DensityMetrics(NamedTuple):
    """Total variation in [0, 1], and KL(p~ || q~) in nats."""

    total_variation: float
    kl_divergence: float


class SampleMetrics(NamedTuple):
    """Distances of binned samples from the exact bin probabilities: total variation in [0, 1], KL(q || p) in nats."""

    total_variation: Measured
    kl_divergence: Measured


class SlicedWasserstein(NamedTuple):
    """A sliced Wasserstein distance and its floor in data units, their ratio, and the standard errors of all three."""

    value: float
    floor: float
    value_std_error: float
    floor_std_error: float
    ratio: float
    ratio_std_error: float


# ---------------------------------------------------------------------------------------------- densities


def density_metrics(log_density, exact_density, limit=4.5, num_cells=90):
    """Compare a density that is known up to a constant with the exact one.

    Total variation is ``1/2 integral |p~ - q~|``, the KL divergence ``KL(p~ || q~) = integral p~ log(p~ / q~)``. Both
    densities are normalised on the square [-limit, limit]^2, which has to hold 99 % of the exact mass. It has
    num_cells^2 cells with 2 x 2 Gauss-Legendre points each; at the defaults, on the toy data with noise 0.1, the
    quadrature is off by less than 1e-4 in both numbers.

    Args:
        log_density: callable, float32 points (n, 2) -> log density (n,) or (n, 1), up to a constant, or minus infinity.
        exact_density: callable, points (n, 2) -> exact density (n,), probability per unit area.
        limit: half the side of the square, in data units.
        num_cells: number of cells along a side.

    Returns:
        ``DensityMetrics(total_variation, kl_divergence)``.
    """
    points, exact = _exact_probabilities(exact_density, limit, check_integer("num_cells", num_cells))
    mass = _check_mass(exact.sum(), limit, num_cells)
    # Every point has the same quadrature weight, so probabilities normalise like the entries of a softmax.
    log_model = log_softmax(log_densities(log_density, points))
    exact = exact / mass
    support = exact > 0
    # In logarithms: a model density that underflows must not make the divergence infinite.
    kl_divergence = (exact[support] * (np.log(exact[support]) - log_model[support])).sum()
    return DensityMetrics(float(np.abs(exact - np.exp(log_model)).sum() / 2), float(kl_divergence))


def fisher_information(exact_density, limit=10.0, num_cells=400):
    """Compute the Fisher information J = E ||grad log p~||^2 = 4 integral ||grad sqrt(p~)||^2 of a density.

    The gradient is taken by Fourier transform on a grid, which is exact to rounding for a density that is smooth on the
    scale of a cell and zero at the border of the square, which has to hold 99.99 % of the mass. Arguments are as in
    ``density_metrics``.

    Returns:
        J, in 1 / (squared data units).
    """
    cell_width = 2 * check_positive("limit", limit) / check_integer("num_cells", num_cells)
    density = _evaluate_on_grid(exact_density, cell_width * (np.arange(num_cells) + 0.5) - limit)
    _check_mass(density.sum() * cell_width**2, limit, num_cells, largest_miss=1e-4)
    wave_numbers = 2 * np.pi * np.fft.fftfreq(num_cells, cell_width)
    # The mean square of a derivative is that of its Fourier transform.
    power = np.abs(np.fft.fft2(np.sqrt(density))) ** 2 / num_cells**2
    return float(4 * np.sum(power * (wave_numbers[:, None] ** 2 + wave_numbers**2)) * cell_width**2)


def minimum_denoising_loss(exact_density, noise_std, limit=10.0, num_cells=400):
    """Compute the least denoising loss that any density estimator in the plane has: 1 - noise_std^2 J / 2.

    The loss is E ||s grad f(x + s n) + n||^2 / d with s = noise_std and d = 2 (arXiv:2001.02728, Eq. 5, times s^2 / d).
    Part of the noise cannot be known from the noisy point, so even f = log p~ leaves this much; what a model has above
    it, times d / s^2, is its Fisher divergence from p~. Other arguments are as in ``fisher_information``.
    """
    noise_std = check_positive("noise_std", noise_std)
    return 1 - noise_std**2 * fisher_information(exact_density, limit, num_cells) / 2


# ---------------------------------------------------------------------------------------------- samples


def sample_metrics(samples, exact_density, sample_real, noise_std, rng=None, limit=4.5, num_bins=90):
    """Compare generated samples, noise added and binned, with the exact density.

    The noisy samples are counted in square bins on [-limit, limit]^2; everything outside is one more bin. With the
    shares q and the exact probabilities p of the bins, total variation is ``1/2 sum |q - p|`` and the KL divergence is
    ``KL(q || p) = sum q log(q / p)``, the direction in which a generator is trained and in which empty bins do no harm.

    Args:
        samples: clean generated samples (n, 2), in data units.
        exact_density: callable, points (n, 2) -> exact density (n,) of real samples with noise.
        sample_real: callable, (n, rng) -> clean real samples (n, 2), for the floor.
        noise_std: standard deviation of the noise, in data units, at least 0.
        rng: a ``numpy.random.Generator``, an integer seed, or None; for the noise and the real samples.
        limit: half the side of the square, in data units.
        num_bins: number of bins along a side.

    Returns:
        ``SampleMetrics(total_variation, kl_divergence)``, each a ``Measured(value, floor)``.
    """
    samples = _check_samples("samples", samples)
    noise_std = check_interval("noise_std", noise_std, 0)
    rng = np.random.default_rng(rng)
    bin_width = 2 * check_positive("limit", limit) / check_integer("num_bins", num_bins)
    cells_per_bin = int(np.ceil(bin_width / 0.1 - 1e-6))
    _, exact = _exact_probabilities(exact_density, limit, num_bins * cells_per_bin)
    exact = exact.reshape(num_bins, 2 * cells_per_bin, num_bins, 2 * cells_per_bin).sum(axis=(1, 3))
    probabilities = np.append(exact, max(1 - exact.sum(), SMALLEST_OUTSIDE_PROBABILITY))

    def compare(clean):
        noisy = clean + np.float32(noise_std) * rng.standard_normal(clean.shape, dtype=np.float32)
        counts, _, _ = np.histogram2d(*noisy.T, bins=num_bins, range=[[-limit, limit]] * 2)
        shares = np.append(counts, len(noisy) - counts.sum()) / len(noisy)
        return np.abs(shares - probabilities).sum() / 2, rel_entr(shares, probabilities).sum()

    values = compare(samples)
    floors = compare(_draw(sample_real, len(samples), rng))
    return SampleMetrics(*(Measured(*map(float, pair)) for pair in zip(values, floors, strict=True)))


def sliced_wasserstein(samples_a, samples_b, num_projections=64):
    """Compute the sliced Wasserstein-1 distance between two samples (n, 2) of the same size, in data units.

    It averages the Wasserstein distance of projections onto directions u (Bonneel et al. 2015), where sorting is
    optimal transport: ``mean_u mean_i |sort(a u)_i - sort(b u)_i|``. 64 equally spaced directions are off by 0.02 %.
    """
    samples_a, samples_b = _check_samples("samples_a", samples_a), _check_samples("samples_b", samples_b)
    if len(samples_a) != len(samples_b):
        raise ValueError(f"the two samples must be equally many, got {len(samples_a)} and {len(samples_b)}")
    num_projections = check_integer("num_projections", num_projections)
    angles = np.pi * np.arange(num_projections) / num_projections
    # By hand: scipy.stats.wasserstein_distance is 20 times slower, as it allows weights.
    costs = []
    for direction in np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32):
        differences = np.sort(samples_a @ direction) - np.sort(samples_b @ direction)
        costs.append(np.mean(np.abs(differences), dtype=np.float64))
    return float(np.mean(costs))


def sliced_wasserstein_to_data(samples, sample_real, rng=None, block_size=50_000):
    """Compute the sliced Wasserstein-1 distance of generated samples from real ones, its floor, and their spread.

    The value compares blocks of generated samples with as many real ones; the floor compares other real ones with
    these. Both are means over at least ten pairs: all the blocks that ``samples`` can be cut into. The floor falls with
    the square root of the size of a block, so only ratios from blocks of one size compare.

    Args:
        samples: clean generated samples (n, 2), in data units, in random order; ten at least.
        sample_real: callable, (n, rng) -> clean real samples (n, 2).
        rng: a ``numpy.random.Generator``, an integer seed, or None; for the real samples.
        block_size: number of samples compared at a time, or a tenth of ``samples`` if that is less.

    Returns:
        ``SlicedWasserstein``. Value and floor share real samples, so part of their errors cancels in the ratio.
    """
    samples = _check_samples("samples", samples)
    if len(samples) < SMALLEST_NUM_PAIRS:
        raise ValueError(f"samples must be at least {SMALLEST_NUM_PAIRS}, got {len(samples)}")
    block_size = min(check_integer("block_size", block_size), len(samples) // SMALLEST_NUM_PAIRS)
    rng = np.random.default_rng(rng)
    pairs = []
    for start in range(0, len(samples) - block_size + 1, block_size):
        real, other_real = (_draw(sample_real, block_size, rng) for _ in range(2))
        block = samples[start : start + block_size]
        pairs.append([sliced_wasserstein(each, real) for each in (block, other_real)])
    values, floors = np.transpose(pairs)
    value, floor, ratio = values.mean(), floors.mean(), values.mean() / floors.mean()
    # The error of the ratio is that of its linear approximation.
    errors = [each.std(ddof=1) / np.sqrt(len(each)) for each in (values, floors, (values - ratio * floors) / floor)]
    return SlicedWasserstein(*map(float, (value, floor, *errors[:2], ratio, errors[2])))


def mode_shares(distances):
    """Compute the share of the samples nearest to each mode, (modes,), from their distances (n, modes)."""
    distances = check_points("distances", distances, (None,), "float64")
    return np.bincount(distances.argmin(axis=1), minlength=distances.shape[1]) / len(distances)


# ---------------------------------------------------------------------------------------------- helpers


def _exact_probabilities(exact_density, limit, num_cells):
    """Quadrature points (4 num_cells^2, 2), float32, and their exact probabilities (4 num_cells^2,); x runs slowest."""
    cell_width = 2 * check_positive("limit", limit) / num_cells
    centres = cell_width * (np.arange(num_cells) + 0.5) - limit
    axis = np.ravel(centres[:, None] + cell_width / np.sqrt(12) * np.array([-1, 1]))  # Gauss-Legendre, equal weights
    probabilities = _evaluate_on_grid(exact_density, axis).ravel() * (cell_width / 2) ** 2
    return _grid_points(axis).astype(np.float32), probabilities


def _grid_points(axis):
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


def _check_mass(mass, limit, num_cells, largest_miss=0.01):
    if not abs(mass - 1) <= largest_miss:
        raise ValueError(
            f"limit={limit!r} and num_cells={num_cells!r} give the exact density a mass of {mass:.6f}; allowed is "
            f"1 +- {largest_miss}: take a larger limit or more cells"
        )
    return mass


def _check_samples(name, samples):
    return check_points(name, samples, (2,), "float32")


def _draw(sample_real, n_samples, rng):
    """Return the real samples (n_samples, 2) that a callable draws."""
    samples = _check_samples("the values of sample_real", sample_real(n_samples, rng))
    if len(samples) != n_samples:
        raise ValueError(f"sample_real must return {n_samples} samples, got {len(samples)}")
    return samples
