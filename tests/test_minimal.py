"""The method in one file, against the exact density of its data."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import minimal
from egm_dde.evaluation import density_metrics, sample_metrics
from utils import noisy_density_2d, sample_2d_data

FILE = Path(minimal.__file__)
EXACT = partial(noisy_density_2d, "2spirals", noise_std=0.1)
REAL = partial(sample_2d_data, "2spirals")


def measure(real, generator):
    """Total variation of the learned density and of 100,000 generated points, with noise 0.1."""
    density = density_metrics(lambda x: real([x, np.full((len(x), 1), np.log(0.1), "float32")]), EXACT)
    z = np.random.default_rng(0).standard_normal((100_000, 2), dtype=np.float32)
    samples = sample_metrics(np.array(generator(z)), EXACT, REAL, 0.1, rng=1)  # noise of a seed other than the latents'
    return np.array([density.total_variation, samples.total_variation.value])


def test_a_hundred_lines_of_keras_numpy_and_matplotlib():
    lines = FILE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"argparse", "keras", "numpy", "tensorflow", "matplotlib"}


def test_its_spirals_are_those_of_the_tutorial():
    tv = sample_metrics(np.array(minimal.sample_spirals(100_000)), EXACT, REAL, 0.1, rng=0).total_variation
    assert tv.value < 1.1 * tv.floor


def test_a_short_training_learns():
    states = [measure(*networks) for step, *networks in minimal.train(100, seed=0) if step in (1, 100)]
    untrained, trained = states
    assert (untrained > (0.45, 0.55)).all()
    assert (trained < (0.25, 0.45)).all()


@pytest.mark.slow
def test_the_full_training_and_its_film(tmp_path):
    *_, (_, *networks) = minimal.train(2000, seed=0)
    assert (measure(*networks) < (0.05, 0.13)).all()  # real points are at 0.06
    subprocess.run([sys.executable, FILE, "--steps=20", "--output=film.gif"], cwd=tmp_path, check=True)
    film = iio.imread(tmp_path / "film.gif")
    assert len(film) > 5 and film.shape[1:] == (480, 480, 3)
