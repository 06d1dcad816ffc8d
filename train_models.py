"""Train the tutorial's model on every data set: ``make models``.

The recipe is the notebook's, as functions: what the benchmarks measure and the ready-trained models are made with.
Run as a script, it writes ``example_models/<dataset>.keras``, without the state of the optimizers, and one picture of
all of them, ``example_models/gallery.png``.
"""

import argparse
import json
import time
import zipfile
from functools import partial
from pathlib import Path

from egm_dde.runtime import prepare_process

prepare_process()  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from egm_dde import evaluation, visualization
from egm_dde.files import replacing
from energy_models import DDE, EGM, build_energy_net, build_generator
from utils import DATASETS, MODE_STDS, distances_to_modes, noisy_density_2d, sample_2d_data

NOISE_RANGE = (0.1, 1.5)
BATCH_SIZE = 512
DDE_STEPS = 2
STEPS_PER_EPOCH = 50
EPOCHS = 100
NUM_BATCHES = 2000
NEWER_SETTINGS = ("quantization_config", "input_axes", "output_axes")  # of Dense and of initializers
FOLDER = Path(__file__).parent / "example_models"


def build_egm(seed=0, epochs=EPOCHS):
    """Build the compiled generative model, with learning rates that fall to zero along a cosine.

    Args:
        seed: integer that fixes initial weights, latents and noise.
        epochs: length of the training, in epochs of ``STEPS_PER_EPOCH`` steps.

    Returns:
        A compiled ``EGM``.
    """

    def adam(learning_rate, num_steps):
        decay = keras.optimizers.schedules.CosineDecay(learning_rate, num_steps)
        return keras.optimizers.Adam(decay, beta_1=0.5)

    def build_dde(seed):
        return DDE(build_energy_net(noise_conditional=True, seed=seed), NOISE_RANGE, seed=seed)

    num_steps = epochs * STEPS_PER_EPOCH
    egm = EGM(build_dde(seed), build_dde(seed + 1), build_generator(seed=seed + 2), dde_steps=DDE_STEPS, seed=seed)
    egm.compile(adam(5e-3, DDE_STEPS * num_steps), adam(2e-3, num_steps))
    return egm


def make_batches(dataset, seed=0):
    """Draw the training data; return an endless ``tf.data.Dataset`` of batches (BATCH_SIZE, 2) in random order."""
    data = sample_2d_data(dataset, NUM_BATCHES * BATCH_SIZE, seed)
    batches = tf.data.Dataset.from_tensor_slices(data.reshape(NUM_BATCHES, BATCH_SIZE, 2))
    return batches.shuffle(NUM_BATCHES, seed=seed).repeat()


def train_egm(dataset, seed=0, epochs=EPOCHS, **options):
    """Train the generative model on a data set.

    Args:
        dataset: one of ``utils.DATASETS``.
        seed: integer that fixes everything that is drawn.
        epochs: length of the training, in epochs of ``STEPS_PER_EPOCH`` steps.
        **options: for ``keras.Model.fit``, such as ``callbacks``.

    Returns:
        The trained ``EGM``.
    """
    egm = build_egm(seed, epochs)
    options = {"epochs": epochs, "steps_per_epoch": STEPS_PER_EPOCH, "verbose": 0, **options}
    egm.fit(make_batches(dataset, seed), **options)
    return egm


def measure(dataset, model, rng=None, n_samples=2_000_000):
    """Measure a trained model on a data set, at its lowest noise level, against the exact density.

    Args:
        dataset: one of ``utils.DATASETS``.
        model: trained ``EGM``.
        rng: a ``numpy.random.Generator``, an integer seed, or None; for the generated and the real samples and the
            noise.
        n_samples: number of generated samples.

    Returns:
        dict of floats, as ``evaluation.results_row``.
    """
    rng = np.random.default_rng(rng)
    noise_std = model.dde_real.noise_range[0]
    return evaluation.results_row(
        model.dde_real.log_density,
        partial(model.sample, seed=int(rng.integers(2**31))),
        partial(noisy_density_2d, dataset, noise_std=noise_std),
        partial(sample_2d_data, dataset),
        noise_std,
        distances_to_modes=partial(distances_to_modes, dataset) if dataset in MODE_STDS else None,
        mode_std=MODE_STDS.get(dataset, 0.0),
        rng=rng,
        n_samples=n_samples,
    )


def save_without_optimizers(model, path):
    """Save a model to a ``.keras`` file without the state of its optimizers, which is most of the file.

    The file loads in Keras 3.8 and newer, whatever version writes it.
    """
    config = model.get_config()
    for part in config.values():
        if isinstance(part, dict):  # a DDE that was compiled would come back with an optimizer
            part.pop("compile_config", None)
    copy = type(model).from_config(config)
    copy.set_weights(model.get_weights())
    with replacing(path) as temporary:
        copy.save(temporary)
        drop_newer_settings(temporary)


def drop_newer_settings(path):
    """Remove ``NEWER_SETTINGS`` from a ``.keras`` file where they are None: Keras 3.8 does not know them."""

    def drop(config):
        return {name: value for name, value in config.items() if value is not None or name not in NEWER_SETTINGS}

    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["config.json"] = json.dumps(json.loads(files["config.json"], object_hook=drop))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def draw_gallery(models):
    """Draw the density and samples of models, a dict by data set, as a Matplotlib figure."""
    figure = Figure(figsize=(3 * len(models), 6.4), layout="constrained")
    axes = figure.subplots(2, len(models))
    for (ax_density, ax_samples), (dataset, model) in zip(axes.T, models.items(), strict=True):
        visualization.plot_density(ax_density, model.dde_real.log_density)
        ax_density.set_title(dataset)
        visualization.plot_samples(ax_samples, sample_2d_data(dataset, 3000, 0), model.sample(3000, seed=0))
    return figure


def main():
    """Train, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of {STEPS_PER_EPOCH} steps each")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    models = {}
    for dataset in DATASETS:
        start = time.perf_counter()
        models[dataset] = train_egm(dataset, arguments.seed, arguments.epochs)
        save_without_optimizers(models[dataset], FOLDER / f"{dataset}.keras")
        print(f"{dataset}: trained in {time.perf_counter() - start:.0f} s")
    draw_gallery(models).savefig(FOLDER / "gallery.png", dpi=70)


if __name__ == "__main__":
    main()
