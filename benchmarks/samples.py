"""Generated points, measured against the exact density."""

from functools import partial

from egm_dde import evaluation
from utils import noisy_density_2d, sample_2d_data

NOISE_STD = 0.1  # at which points are compared with the truth


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
