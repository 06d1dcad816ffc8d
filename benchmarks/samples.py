"""Generated points: corrected by the two densities of a model, and measured against the exact density."""

import math
from functools import partial

import numpy as np

from egm_dde import evaluation
from utils import noisy_density_2d, sample_2d_data

NOISE_STD = 0.1  # at which points are compared with the truth
CHUNK_SIZE = 8192  # generated at a time: larger temporaries than 32 MiB cost page faults


def sample_corrected(model, n_samples, seed):
    """Draw points (n, 2) from an ``EGM`` and correct them by its two densities."""
    rng, corrected = np.random.default_rng(seed), []
    while (num_missing := n_samples - sum(map(len, corrected))) > 0:
        points = model.sample(1000 + num_missing, seed=int(rng.integers(2**31)))
        parts = np.array_split(points, 1 + len(points) // CHUNK_SIZE)
        corrected += [correct(part, model.dde_real, model.dde_fake, rng) for part in parts]
    return np.concatenate(corrected)[:n_samples]


def correct(points, dde_real, dde_fake, rng):
    """Add noise, reject where there are too many points, and follow the probability flow back, as the tutorial does."""
    noise_std = math.sqrt(2) * NOISE_STD
    noisy = points + noise_std * rng.standard_normal(points.shape, dtype=np.float32)
    log_real, score = dde_real(noisy, noise_std=noise_std)
    log_ratio = (log_real - dde_fake.log_density(noisy, noise_std=noise_std)).numpy()[:, 0]
    is_kept = rng.random(len(points)) < np.exp(np.minimum(0, log_ratio - np.median(log_ratio)))
    halfway = noisy + NOISE_STD**2 / 2 * score  # of the variance; noise of NOISE_STD is left
    return (noisy + NOISE_STD**2 * dde_real.score(halfway, noise_std=NOISE_STD)).numpy()[is_kept]


def measure(dataset, samples, seed):
    """Measure points of a data set, noise NOISE_STD added: a dict of floats."""
    sample_real = partial(sample_2d_data, dataset)
    exact_density = partial(noisy_density_2d, dataset, noise_std=NOISE_STD)
    (tv, tv_floor), (kl, kl_floor) = evaluation.sample_metrics(samples, exact_density, sample_real, NOISE_STD, seed)
    sliced = evaluation.sliced_wasserstein_to_data(samples, sample_real, seed)
    return {
        "tv": tv,
        "tv_floor": tv_floor,
        "kl": kl,
        "kl_floor": kl_floor,
        "sliced_w1": sliced.value,
        "sliced_w1_floor": sliced.floor,
        "sliced_w1_ratio": sliced.ratio,
        "sliced_w1_ratio_std_error": sliced.ratio_std_error,
    }
