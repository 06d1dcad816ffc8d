"""Train the tutorial's model on every data set: ``make models``.

The recipe is the notebook's, as functions: what the benchmarks measure and the ready-trained models are made with.
Run as a script, it writes ``example_models/<dataset>.keras``, without the state of the optimizers, and one picture of
all of them, ``example_models/gallery.png``.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up notes would fill the terminal
os.environ.setdefault(
    "TF_NUM_INTRAOP_THREADS", "1"
)  # small matrices: cores share out whole operations, not parts of them

import keras
import tensorflow as tf
from matplotlib.figure import Figure

from egm_dde import visualization
from energy_models import DDE, EGM, build_energy_net, build_generator
from utils import DATASETS, sample_2d_data

NOISE_RANGE = (0.1, 1.5)
BATCH_SIZE = 512
DDE_STEPS = 2
STEPS_PER_EPOCH = 50
EPOCHS = 100
NUM_BATCHES = 2000
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


def save_without_optimizers(model, path):
    """Save a model to a ``.keras`` file without the state of its optimizers, which is most of the file."""
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    copy.save(path)


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
