"""The toy 2D distributions: samples and exact densities of the noisy data (NumPy and SciPy, no TensorFlow).

The four distributions are those of the published tutorial, which took them from FFJORD (arXiv:1810.01367):

* ``8gaussians``: eight isotropic Gaussians on a circle.
* ``2spirals``: two arms, each the other one turned by 180 degrees.
* ``checkerboard``: uniform on the eight dark 2 x 2 squares of [-4, 4]^2.
* ``rings``: four concentric rings of equal weight, blurred by Gaussian noise.

Points, distances and noise levels are finite, in data units. All functions raise ValueError for other arguments.
"""

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import i0e, ndtr, roots_legendre

from egm_dde.checks import check_integer, check_interval, check_points

GAUSSIAN_STD = 0.5 / np.sqrt(2)
_ANGLES = np.arange(8) * np.pi / 4
GAUSSIAN_CENTRES = (4 / np.sqrt(2)) * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)  # (8, 2)

SPIRAL_MAX_ANGLE = 3 * np.pi  # one and a half turns
SPIRAL_SCALE = 1 / 3
SPIRAL_JITTER = 0.5  # width of the uniform offset, before scaling
SPIRAL_STD = 0.1

SQUARE_SIZE = 2.0
SQUARE_CORNERS = SQUARE_SIZE * np.array(
    [(column, row) for column in range(-2, 2) for row in ((-2, 0) if column % 2 == 0 else (-1, 1))], dtype=float
)  # (8, 2), lower left corners of the dark squares

RING_RADII = np.array([3.0, 2.25, 1.5, 0.75])
RING_STD = 0.08

DATASETS = ("8gaussians", "2spirals", "checkerboard", "rings")


def sample_2d_data(dataset, n_samples, rng=None):
    """Draw independent samples, a float32 array (n_samples, 2), of a toy distribution, one of ``DATASETS``.

    ``rng`` is a ``numpy.random.Generator``, an integer seed, or None for fresh entropy.
    """
    _check_dataset(dataset)
    n_samples = check_integer("n_samples", n_samples)
    try:
        rng = np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise ValueError(f"rng must be a numpy.random.Generator, a seed of at least 0 or None, got {rng!r}") from None
    if dataset == "8gaussians":
        centres = GAUSSIAN_CENTRES[rng.integers(len(GAUSSIAN_CENTRES), size=n_samples)]
        samples = centres + GAUSSIAN_STD * rng.standard_normal((n_samples, 2))
    elif dataset == "2spirals":
        # The square root makes the angle's density proportional to the angle: about even along the arm.
        angles = SPIRAL_MAX_ANGLE * np.sqrt(rng.random(n_samples))
        arm = _spiral_corners(angles) + SPIRAL_SCALE * SPIRAL_JITTER * rng.random((n_samples, 2))
        signs = rng.choice([-1.0, 1.0], size=(n_samples, 1))
        samples = signs * arm + SPIRAL_STD * rng.standard_normal((n_samples, 2))
    elif dataset == "checkerboard":
        corners = SQUARE_CORNERS[rng.integers(len(SQUARE_CORNERS), size=n_samples)]
        samples = corners + SQUARE_SIZE * rng.random((n_samples, 2))
    else:
        radii = RING_RADII[rng.integers(len(RING_RADII), size=n_samples), None]
        angles = 2 * np.pi * rng.random((n_samples, 1))
        circles = radii * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        samples = circles + RING_STD * rng.standard_normal((n_samples, 2))
    return samples.astype(np.float32)


def noisy_density_2d(dataset, points, noise_std):
    """Evaluate the exact density of ``data + N(0, noise_std^2 I)``, the noisy density of arXiv:2001.02728, Eq. 2.

    This is what a denoising density estimator learns. Gaussians stay Gaussians, a square becomes a product of
    differences of normal distribution functions, a ring becomes a Bessel function, and the spirals are a Gauss-Legendre
    quadrature over the angle, exact to rounding. ``points`` are (n, 2), and ``noise_std`` is at least 0. Returns a
    float64 array (n,), probability per unit area.
    """
    _check_dataset(dataset)
    points = check_points("points", points, (2,), "float64")
    noise_std = check_interval("noise_std", noise_std, 0)
    if dataset == "8gaussians":
        variance = GAUSSIAN_STD**2 + noise_std**2
        squared_distances = cdist(points, GAUSSIAN_CENTRES, "sqeuclidean")  # (n, 8)
        return np.exp(-squared_distances / (2 * variance)).mean(axis=-1) / (2 * np.pi * variance)
    if dataset == "2spirals":
        return _spirals_density(points, np.hypot(SPIRAL_STD, noise_std))
    if dataset == "checkerboard":
        sides = _interval_density(points[:, None] - SQUARE_CORNERS, SQUARE_SIZE, noise_std)  # (n, 8, 2)
        return sides.prod(axis=-1).mean(axis=-1)
    variance = RING_STD**2 + noise_std**2
    radii = np.linalg.norm(points, axis=1)[:, None]  # (n, 1)
    # A Gaussian averaged over a circle; i0e is the Bessel function I_0 times exp(-|argument|), so nothing overflows.
    ring = np.exp(-((radii - RING_RADII) ** 2) / (2 * variance)) * i0e(radii * RING_RADII / variance)
    return ring.mean(axis=1) / (2 * np.pi * variance)


def distances_to_modes(dataset, points):
    """Compute the distances of points (n, 2) from the modes: a Gaussian's centre, a dark square or a ring's circle.

    They come as a float64 array (n, number of modes), in the order of ``GAUSSIAN_CENTRES``, ``SQUARE_CORNERS`` or
    ``RING_RADII``. The modes have equal weight. "2spirals" is refused: its arms are too close to tell apart.
    """
    _check_dataset(dataset, ("8gaussians", "checkerboard", "rings"), "one with modes:")
    points = check_points("points", points, (2,), "float64")
    if dataset == "8gaussians":
        return cdist(points, GAUSSIAN_CENTRES)
    if dataset == "rings":
        return np.abs(np.linalg.norm(points, axis=1, keepdims=True) - RING_RADII)
    half = SQUARE_SIZE / 2
    beyond = np.maximum(np.abs(points[:, None] - (SQUARE_CORNERS + half)) - half, 0)  # (n, 8, 2)
    return np.hypot(beyond[..., 0], beyond[..., 1])


def _check_dataset(dataset, allowed=DATASETS, needed="one of"):
    if not isinstance(dataset, str) or dataset not in allowed:
        raise ValueError(f"dataset must be {needed} {', '.join(allowed)}; got {dataset!r}")


def _spiral_corners(angles):
    """Lower left corners (n, 2) of the square of side SPIRAL_JITTER * SPIRAL_SCALE that an angle spreads over."""
    return SPIRAL_SCALE * np.stack([-angles * np.cos(angles), angles * np.sin(angles)], axis=-1)


def _spirals_density(points, std):
    # The arm moves by at most pi per radian, so neighbouring nodes are at most about 0.6 std apart on it; the integrand
    # is smooth on the scale of std, so the quadrature is exact to rounding.
    num_nodes = int(np.ceil(45 / std)) + 64
    nodes, weights = roots_legendre(num_nodes)
    angles = SPIRAL_MAX_ANGLE * (nodes + 1) / 2
    angle_weights = weights * (SPIRAL_MAX_ANGLE / 2) * (2 * angles / SPIRAL_MAX_ANGLE**2)  # sums to 1
    corners = _spiral_corners(angles)
    # The second arm is the first one negated: evaluate the first arm at the points and at their mirror images.
    both = np.concatenate([points, -points])
    arm, rows = np.empty(len(both)), max(1, 2**19 // num_nodes)  # so many rows at a time, to bound the memory
    for start in range(0, len(both), rows):
        sides = []
        for coordinate, corner in zip(both[start : start + rows].T, corners.T, strict=True):
            values, index = np.unique(coordinate, return_inverse=True)  # those of a grid repeat
            sides.append(_interval_density(values[:, None] - corner, SPIRAL_SCALE * SPIRAL_JITTER, std)[index])
        arm[start : start + rows] = (sides[0] * sides[1]) @ angle_weights
    return arm.reshape(2, len(points)).mean(axis=0)


def _interval_density(offsets, size, std):
    """Density of the uniform distribution on [0, size] plus N(0, std^2)."""
    if std == 0:
        return ((offsets >= 0) & (offsets < size)) / size  # half-open, so that shared ends count once
    centred = -np.abs(offsets - size / 2)  # there the difference of distribution functions is the more precise
    return (ndtr((centred + size / 2) / std) - ndtr((centred - size / 2) / std)) / size
