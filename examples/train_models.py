"""Train the tutorial's model on every data set: ``make models``; or film it on one: ``make gifs``.

The recipe is the notebook's, for the benchmarks too. The models go to ``example_models/``, with a picture of all.
"""

import argparse
import re
import sys
import zipfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from egm_dde.runtime import prepare_process

prepare_process()  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf
from matplotlib import colormaps
from matplotlib.figure import Figure

from egm_dde import evaluation, visualization
from egm_dde.files import check_writable, replacing
from energy_models import DDE, EGM, build_energy_net, build_generator
from utils import DATASETS, distances_to_modes, noisy_density_2d, sample_2d_data

NOISE_STD = 0.1  # at which models are compared with the truth
NOISE_RANGE = (0.05, 1.5)  # from below NOISE_STD: the generator does not feel lumps that the lowest level blurs
EGM_OPTIONS = {"dde_steps": 3, "real_steps": 2, "level_power": 0.5}
LAST_RATE = 0.003  # of the real DDE, as a share of the first
BATCH_SIZE, NUM_BATCHES = 512, 2000
STEPS_PER_EPOCH, EPOCHS = 50, 100
FOLDER = ROOT / "example_models"
ON_SQUARE = {"origin": "lower", "extent": (-4, 4, -4, 4), "interpolation": "bilinear"}


def build_egm(seed=0, epochs=EPOCHS):
    """Build the compiled model for a training of so many epochs; the seed fixes initial weights, latents and noise."""
    ddes = (DDE(build_energy_net(noise_conditional=True, seed=i), NOISE_RANGE, seed=i) for i in (seed, seed + 1))
    egm = EGM(*ddes, build_generator(seed=seed + 2), seed=seed, **EGM_OPTIONS)
    compile_egm(egm, epochs * STEPS_PER_EPOCH)
    return egm


def compile_egm(egm, num_steps):
    """Give a model optimizers whose learning rates fall to zero along a cosine, in ``num_steps`` training steps.

    That of the real DDE falls exponentially: its data stay the same, while the other two networks follow each other.
    """
    schedules = keras.optimizers.schedules
    decays = [schedules.CosineDecay(5e-3, egm.dde_steps * num_steps), schedules.CosineDecay(3e-3, num_steps)]
    decays.append(schedules.ExponentialDecay(5e-3, egm.real_steps * num_steps, LAST_RATE))
    egm.compile(*(keras.optimizers.Adam(decay, beta_1=0.5) for decay in decays))


def make_batches(dataset, seed=0):
    """Draw the training data; return an endless ``tf.data.Dataset`` of batches (BATCH_SIZE, 2) in random order."""
    data = sample_2d_data(dataset, NUM_BATCHES * BATCH_SIZE, seed).reshape(NUM_BATCHES, BATCH_SIZE, 2)
    return tf.data.Dataset.from_tensor_slices(data).shuffle(NUM_BATCHES, seed=seed).repeat()


def train_egm(dataset, seed=0, epochs=EPOCHS, **options):
    """Train the model on a data set; options are those of ``keras.Model.fit``, such as ``callbacks``."""
    egm = build_egm(seed, epochs)
    options = {"epochs": epochs, "steps_per_epoch": STEPS_PER_EPOCH, "verbose": 0, **options}
    egm.fit(make_batches(dataset, seed), **options)
    return egm


def measure(dataset, model, rng=None, n_samples=2_000_000):
    """Measure a trained ``EGM`` on a data set with noise NOISE_STD: a dict of floats, one row of a table."""
    rng = np.random.default_rng(rng)
    exact_density = partial(noisy_density_2d, dataset, noise_std=NOISE_STD)
    sample_real = partial(sample_2d_data, dataset)
    samples = model.sample(n_samples, seed=int(rng.integers(2**31)))
    log_density = partial(model.dde_real.log_density, noise_std=NOISE_STD)
    density_tv, density_kl = evaluation.density_metrics(log_density, exact_density)
    tv, kl = evaluation.sample_metrics(samples, exact_density, sample_real, NOISE_STD, rng)
    sliced = evaluation.sliced_wasserstein_to_data(samples, sample_real, rng)._asdict()
    shares = np.nan if dataset == "2spirals" else evaluation.mode_shares(distances_to_modes(dataset, samples))
    return {
        "density_tv": density_tv,
        "density_kl": density_kl,
        "generator_tv": tv.value,
        "generator_tv_floor": tv.floor,
        "generator_kl": kl.value,
        "generator_kl_floor": kl.floor,
        "sliced_wasserstein": sliced.pop("value"),
        **{f"sliced_wasserstein_{name.removeprefix('value_')}": number for name, number in sliced.items()},
        "smallest_mode_share": float(np.min(shares)),
        "largest_mode_share": float(np.max(shares)),
    }


def save_without_optimizers(model, path, half=False):
    """Save a model without the state of its optimizers, most of the file, for Keras 3.8 and newer.

    With ``half``, its weights are rounded to half precision, with which the file takes two bytes or less for each.
    """
    config = model.get_config()
    for part in model.parts:  # a DDE that was compiled would come back with an optimizer
        config[part].pop("compile_config", None)
    copy = type(model).from_config(config)
    copy.set_weights(
        [
            weight.astype(np.float16 if half and weight.dtype == np.float32 else weight.dtype)
            for weight in model.get_weights()
        ]
    )
    save_portably(copy, path)


def save_portably(model, path):
    """Save any ``keras.Model`` without settings that Keras 3.8 refuses because it does not know them, compressed."""
    with replacing(path) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        newer = rb'"(quantization_config|input_axes|output_axes)": null'
        files["config.json"] = re.sub(rb", " + newer + rb"|(?<={)" + newer + rb", ", b"", files["config.json"])
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:  # which finds what both densities share
            for name, content in files.items():
                archive.writestr(name, content)


def exact_log_density(dataset, points, noise_std):
    """The log density (n,) of noisy data, also where it underflows."""
    return np.log(np.maximum(noisy_density_2d(dataset, points, noise_std), 1e-300))


def draw_over_density(ax, points, density):
    """Draw points (n, 2) as dots over a density, as of ``visualization.grid_density``, in pale blue."""
    ax.imshow(density, "Blues", vmin=0, vmax=2 * density.max(), **ON_SQUARE)
    ax.plot(*points.T, "o", color=visualization.VERMILION, markersize=2.2, markeredgewidth=0)
    ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[])


def draw_method(ax, points, dde_real, dde_fake, noise_std=0.3):
    """Draw what moves generated points (n, 2): arrows along grad log p~ - grad log q~, over log p~ - log q~.

    Green lacks points, purple has too many. Both logarithms are of the density plus 4 % of the highest of p~, so that
    the colour fades where neither has mass; arrows, in noise units, are drawn where generated points are.
    """
    real, fake = (
        visualization.grid_density(partial(dde.log_density, noise_std=noise_std), resolution=60)
        for dde in (dde_real, dde_fake)
    )
    faint = 0.04 * real.max()
    excess = np.log((real + faint) / (fake + faint))
    ax.imshow(excess, colormaps["PRGn"].resampled(9), vmin=-1.8, vmax=1.8, **ON_SQUARE)
    ax.plot(*points.T, "o", color=visualization.VERMILION, markersize=2.2, markeredgewidth=0)
    places = np.stack(np.meshgrid(*[np.linspace(-3.75, 3.75, 16, dtype="float32")] * 2), axis=-1).reshape(-1, 2)
    log_density = dde_fake.log_density(places, noise_std).numpy()[:, 0]
    places = places[log_density > log_density.max() - 5]
    push = dde_real.score(places, noise_std) - dde_fake.score(places, noise_std)
    visualization.plot_arrows(ax, places, noise_std * push.numpy())


def make_films(dataset, folder, seed=0):
    """Make the callbacks that film the training: densities on one colour scale, points over the data, the method."""
    exact = visualization.grid_density(partial(exact_log_density, dataset, noise_std=NOISE_RANGE[0]))

    def draw_density(ax, model, name):
        visualization.plot_density(ax, getattr(model, name).log_density, max_density=exact.max())

    def draw_samples(ax, model):
        draw_over_density(ax, model.sample(2000, seed=seed), exact)

    def draw_pushed(ax, model):
        draw_method(ax, model.sample(1000, seed=seed), model.dde_real, model.dde_fake)

    films = {f"den_{name}.gif": partial(draw_density, name=f"dde_{name}") for name in ("real", "fake")}
    films |= {"samples.gif": draw_samples, "method.gif": draw_pushed}
    return [visualization.GifCallback(Path(folder) / name, draw, num_colors=24) for name, draw in films.items()]


def draw_gallery(models):
    """Draw exact density, learned density and samples of models, a dict by data set, as a Matplotlib figure."""
    figure = Figure(figsize=(3 * len(models), 9.8), layout="constrained")
    axes = figure.subplots(3, len(models))
    for ax, label in zip(axes[:, 0], ("exact density", "real DDE", "samples"), strict=True):
        ax.set_ylabel(label)
    for (ax_exact, ax_density, ax_samples), (dataset, model) in zip(axes.T, models.items(), strict=True):
        truth = visualization.plot_density(ax_exact, partial(exact_log_density, dataset, noise_std=NOISE_STD))
        ax_exact.set_title(dataset)
        log_density = partial(model.dde_real.log_density, noise_std=NOISE_STD)
        visualization.plot_density(ax_density, log_density, max_density=truth.get_array().max())
        visualization.plot_samples(ax_samples, sample_2d_data(dataset, 3000, 0), model.sample(3000, seed=0))
    return figure


def main():
    """Train, save and draw; or film."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of {STEPS_PER_EPOCH} steps each")
    parser.add_argument("--gifs", action="store_true", help="train on one data set and write the films alone")
    parser.add_argument("--dataset", default=DATASETS[1], choices=DATASETS, help="to film")
    parser.add_argument("--output-dir", default="example_images", help="folder of the films")
    arguments = parser.parse_args()
    films = make_films(arguments.dataset, arguments.output_dir, arguments.seed) if arguments.gifs else []
    names = (*(f"{dataset}.keras" for dataset in DATASETS), "gallery.png")
    try:
        for path in [film.path for film in films] or [FOLDER / name for name in names]:
            check_writable(path)
    except OSError as error:
        parser.error(str(error))
    if arguments.gifs:
        train_egm(arguments.dataset, arguments.seed, arguments.epochs, callbacks=films, verbose=2)
        print(*(film.path for film in films), "written")
        return
    models = {}
    for dataset in DATASETS:
        models[dataset] = train_egm(dataset, arguments.seed, arguments.epochs)
        save_without_optimizers(models[dataset], FOLDER / f"{dataset}.keras")
        print(f"{dataset}: trained", flush=True)
    draw_gallery(models).savefig(FOLDER / "gallery.png", dpi=120)


if __name__ == "__main__":
    main()
