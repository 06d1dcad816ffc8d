"""The ready-made models load, and correct points, on every version of the packages that the project allows."""

from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest

from egm_dde.evaluation import sample_metrics
from energy_models import EGM
from utils import DATASETS, noisy_density_2d, sample_2d_data

FOLDER = Path(__file__).parent.parent / "example_models"


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_ready_made_model_loads_and_samples(dataset):
    egm = EGM.load(FOLDER / f"{dataset}.keras")
    points = np.asarray(egm.sample(1000, seed=0))
    assert points.shape == (1000, 2)
    assert np.isfinite(points).all()
    x = sample_2d_data(dataset, 1000, 0)
    real, fake = (np.asarray(dde.log_density(x, noise_std=0.1)) for dde in (egm.dde_real, egm.dde_fake))
    assert np.std(real - fake) < 0.5  # where the data are; each has a constant of its own
    assert isinstance(keras.saving.load_model(FOLDER / f"{dataset}.keras"), EGM)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_two_densities_correct_points(dataset):
    egm = EGM.load(FOLDER / f"{dataset}.keras")
    truth = partial(noisy_density_2d, dataset, noise_std=0.1), partial(sample_2d_data, dataset), 0.1

    def measure_excess(**options):
        tv, kl = sample_metrics(egm.sample(100_000, seed=0, **options), *truth, rng=0)
        return np.array([tv.value**2 - tv.floor**2, kl.value - kl.floor])

    assert (measure_excess(corrected=True) < 0.5 * measure_excess()).all()
