"""How close a model is to the truth, for data in the plane whose density is known (NumPy and SciPy, no TensorFlow).

p~ is the exact density of data with noise, and q~ the model's. These arguments mean the same in all functions:
``exact_density`` maps points (n, 2) to their exact densities (n,), probability per unit area. ``sample_real`` maps
(n, rng) to n clean real samples (n, 2). For the toy data, they are

    exact_density = functools.partial(utils.noisy_density_2d, "rings", noise_std=0.1)
    sample_real = functools.partial(utils.sample_2d_data, "rings")

``samples`` are clean generated samples (n, 2). ``rng`` is a ``numpy.random.Generator``, an integer seed, or None.
``limit`` is half the side of the square [-limit, limit]^2, which has ``num_cells`` or ``num_bins`` cells along a side.
Points, limits and noise levels are in data units.

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


def density_metrics(log_density, exact_density, limit=4.5, num_cells=90):
    """Compare a density that is known up to a constant with the exact one.

    Total variation is ``1/2 integral |p~ - q~|``, the KL divergence ``KL(p~ || q~) = integral p~ log(p~ / q~)``. The
    callable ``log_density`` maps float32 points (n, 2) to finite numbers or minus infinity, (n,) or (n, 1). Both
    densities are normalised on the square, which has to hold 99 % of the exact mass. Its cells have 2 x 2
    Gauss-Legendre points each. At the defaults, both numbers are off by less than 1e-4 for toy data with noise 0.1.
    """
    points, density, spacing = _evaluate_on_grid(exact_density, limit, num_cells, largest_miss=0.01)
    exact = density.ravel() * spacing**2
    exact = exact / exact.sum()
    # Every point has the same quadrature weight, so probabilities normalise like the entries of a softmax.
    log_model = log_softmax(log_densities(log_density, points.astype(np.float32)))
    support = exact > 0
    # In logarithms: a model density that underflows must not make the divergence infinite.
    kl_divergence = (exact[support] * (np.log(exact[support]) - log_model[support])).sum()
    return DensityMetrics(float(np.abs(exact - np.exp(log_model)).sum() / 2), float(kl_divergence))


def fisher_information(exact_density, limit=10.0, num_cells=400):
    """Compute the Fisher information J = E ||grad log p~||^2 = 4 integral ||grad sqrt(p~)||^2 of a density.

    Its unit is 1 / (data unit)^2. The gradient is taken by Fourier transform on a grid, which is exact to rounding for
    a density that is smooth on the scale of a cell and zero at the border of the square. The square has to hold 99.99 %
    of the mass.
    """
    _, density, spacing = _evaluate_on_grid(exact_density, limit, num_cells, largest_miss=1e-4, nodes=(0,))
    wave_numbers = 2 * np.pi * np.fft.fftfreq(num_cells, spacing)
    # The mean square of a derivative is that of its Fourier transform.
    power = np.abs(np.fft.fft2(np.sqrt(density))) ** 2 / num_cells**2
    return float(4 * np.sum(power * (wave_numbers[:, None] ** 2 + wave_numbers**2)) * spacing**2)


def minimum_denoising_loss(exact_density, noise_std, limit=10.0, num_cells=400):
    """Compute the least denoising loss that any density estimator in the plane has: 1 - noise_std^2 J / 2.

    The loss is E ||s grad f(x + s n) + n||^2 / d with s = noise_std and d = 2 (arXiv:2001.02728, Eq. 5, times s^2 / d).
    Part of the noise cannot be known from the noisy point, so even f = log p~ leaves this much; what a model has above
    it, times d / s^2, is its Fisher divergence from p~.
    """
    return 1 - check_positive("noise_std", noise_std) ** 2 * fisher_information(exact_density, limit, num_cells) / 2


def sample_metrics(samples, exact_density, sample_real, noise_std, rng=None, limit=4.5, num_bins=90):
    """Compare generated samples, to which noise is added here, with the exact density of real samples with this noise.

    The noisy samples are counted in the square's bins; everything outside is one more bin. With the shares q and the
    exact probabilities p of the bins, total variation is ``1/2 sum |q - p|`` and the KL divergence is ``KL(q || p) =
    sum q log(q / p)``, the direction in which a generator is trained and in which empty bins do no harm. ``noise_std``
    is at least 0. ``rng`` draws the noise and the real samples of the floors.
    """
    samples = check_points("samples", samples, (2,), "float32")
    noise_std = np.float32(check_interval("noise_std", noise_std, 0))
    rng = np.random.default_rng(rng)
    bin_width = 2 * check_positive("limit", limit) / check_integer("num_bins", num_bins)
    cells_per_bin = int(np.ceil(bin_width / 0.1 - 1e-6))
    _, density, spacing = _evaluate_on_grid(exact_density, limit, num_bins * cells_per_bin)
    exact = (density * spacing**2).reshape(num_bins, 2 * cells_per_bin, num_bins, 2 * cells_per_bin).sum(axis=(1, 3))
    probabilities = np.append(exact, max(1 - exact.sum(), SMALLEST_OUTSIDE_PROBABILITY))

    def compare(clean):
        noisy = clean + noise_std * rng.standard_normal(clean.shape, dtype=np.float32)
        counts, _, _ = np.histogram2d(*noisy.T, bins=num_bins, range=[[-limit, limit]] * 2)
        shares = np.append(counts, len(noisy) - counts.sum()) / len(noisy)
        return np.abs(shares - probabilities).sum() / 2, rel_entr(shares, probabilities).sum()

    pairs = zip(compare(samples), compare(_draw(sample_real, len(samples), rng)), strict=True)
    return SampleMetrics(*(Measured(*map(float, pair)) for pair in pairs))


def sliced_wasserstein(samples_a, samples_b, num_projections=64):
    """Compute the sliced Wasserstein-1 distance between two samples (n, 2) of the same size, in data units.

    It averages the Wasserstein distance of projections onto directions u (Bonneel et al. 2015), where sorting is
    optimal transport: ``mean_u mean_i |sort(a u)_i - sort(b u)_i|``. 64 equally spaced directions are off by 0.02 %.
    """
    samples_a = check_points("samples_a", samples_a, (2,), "float32")
    samples_b = check_points("samples_b", samples_b, (2,), "float32")
    if len(samples_a) != len(samples_b):
        raise ValueError(f"the two samples must be equally many, got {len(samples_a)} and {len(samples_b)}")
    angles = np.pi * np.arange(check_integer("num_projections", num_projections)) / num_projections
    # By hand: scipy.stats.wasserstein_distance is 20 times slower, as it allows weights.
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    differences = (np.sort(samples_a @ each) - np.sort(samples_b @ each) for each in directions)
    return float(np.mean([np.mean(np.abs(each), dtype=np.float64) for each in differences]))


def sliced_wasserstein_to_data(samples, sample_real, rng=None, block_size=50_000):
    """Compute the sliced Wasserstein-1 distance of generated samples from real ones, its floor, and their spread.

    ``samples`` are ten at least, in random order. They are cut into blocks of ``block_size``, or of a tenth of them if
    that is less. The value compares each block with as many real samples, the floor compares other real ones with
    these, and both are means over the blocks. Because they share real samples, part of their errors cancels in the
    ratio. The floor falls with the square root of the block's size: only ratios from blocks of one size compare.
    """
    samples = check_points("samples", samples, (2,), "float32")
    if len(samples) < SMALLEST_NUM_PAIRS:
        raise ValueError(f"samples must be at least {SMALLEST_NUM_PAIRS}, got {len(samples)}")
    block_size = min(check_integer("block_size", block_size), len(samples) // SMALLEST_NUM_PAIRS)
    rng = np.random.default_rng(rng)
    pairs = []
    for start in range(0, len(samples) - block_size + 1, block_size):
        real, other_real = (_draw(sample_real, block_size, rng) for _ in range(2))
        value = sliced_wasserstein(samples[start : start + block_size], real)
        pairs.append((value, sliced_wasserstein(other_real, real)))
    values, floors = np.transpose(pairs)
    value, floor, ratio = values.mean(), floors.mean(), values.mean() / floors.mean()
    # The error of the ratio is that of its linear approximation.
    errors = [each.std(ddof=1) / np.sqrt(len(each)) for each in (values, floors, (values - ratio * floors) / floor)]
    return SlicedWasserstein(*map(float, (value, floor, *errors[:2], ratio, errors[2])))


def mode_shares(distances):
    """Compute the share of the samples nearest to each mode, (modes,), from their distances (n, modes)."""
    distances = check_points("distances", distances, (None,), "float64")
    return np.bincount(distances.argmin(axis=1), minlength=distances.shape[1]) / len(distances)


def _evaluate_on_grid(exact_density, limit, num_cells, largest_miss=np.inf, nodes=(-1, 1)):
    """Points (n^2, 2) of a grid on which x runs slowest, the density (n, n) there, and the mean spacing along an axis.

    The nodes -1 and 1 in a cell are those of Gauss-Legendre, with equal weights; the node 0 is its centre.
    """
    cell_width = 2 * check_positive("limit", limit) / check_integer("num_cells", num_cells)
    centres = cell_width * (np.arange(num_cells) + 0.5) - limit
    axis = np.ravel(centres[:, None] + cell_width / np.sqrt(12) * np.array(nodes))
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.asarray(exact_density(points.copy()), dtype=np.float64)  # it may work in place
    if density.shape != (len(points),):
        raise ValueError(f"exact_density must return shape ({len(points)},), got {density.shape}")
    if not (np.isfinite(density) & (density >= 0)).all():
        raise ValueError("exact_density must return finite numbers of at least 0, got others among them")
    spacing = cell_width / len(nodes)
    mass = density.sum() * spacing**2
    if not abs(mass - 1) <= largest_miss:
        given = f"limit={limit!r} and num_cells={num_cells!r} give the exact density a mass of {mass:.6f}"
        raise ValueError(f"{given}; allowed is 1 +- {largest_miss}: take a larger limit or more cells")
    return points, density.reshape(len(axis), len(axis)), spacing


def _draw(sample_real, n_samples, rng):
    samples = check_points("the values of sample_real", sample_real(n_samples, rng), (2,), "float32")
    if len(samples) != n_samples:
        raise ValueError(f"sample_real must return {n_samples} samples, got {len(samples)}")
    return samples
