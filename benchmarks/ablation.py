"""What each ingredient is worth: the recipe with one of them switched off, against the exact densities.

Each variant trains on every data set over several seeds, for a fifth of the usual steps. No run is left out; each is a
line of ``ablation.csv``.

    python benchmarks/ablation.py [--seeds 3] [--steps 1000] [--datasets rings ...] [--variants ...] [--tables-only]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "examples")]

from egm_dde.runtime import prepare_process

prepare_process()

import keras
import report
import tensorflow as tf

import train_models
from egm_dde import draws, networks
from energy_models import DDE, EGM, build_energy_net, build_generator
from utils import DATASETS

FILE = report.FOLDER / "ablation.csv"
# title: columns of the csv file
TABLES = {"density TV / generator TV": ("density_tv", "generator_tv"), "generator KL (nats)": ("generator_kl",)}


class PlainDDE(DDE):
    """A DDE whose targets are not averaged: the own noise of each point."""

    @staticmethod
    def average_over_sources(x, noisy_x, noise, noise_std):
        """Return the noise, and its squared norm twice."""
        squared_norm = tf.reduce_sum(tf.square(noise), axis=-1, keepdims=True)
        return noise, squared_norm, squared_norm


class PlainEGM(EGM):
    """An EGM with independent latents."""

    def draw_latents(self, n_samples, purpose, step):
        """Draw latents (n_samples, 2) and a key for the noise."""
        latent_key, noise_key = draws.split(draws.draw_key(self.seed, purpose, step))
        return draws.normal((n_samples, *self.latent_shape), latent_key), noise_key


@networks.register
class UndampedFeatures(networks.RandomFourierFeatures):
    """Fourier features that are the same at all noise levels."""

    def call(self, x, log_noise_std=None):
        return super().call(x)


@networks.register
class FlatLogDensity(networks.GaussianLogDensity):
    """Log density 0 everywhere."""

    def call(self, x, log_noise_std=None):
        return keras.ops.zeros_like(x[:, :1])


def build_wide_generator(seed):
    """A generator whose last layer has the usual initial weights, without the start data_std * z."""
    z = keras.Input((2,))
    hidden = networks.RandomFourierFeatures(64, 3.0, seed)(z)
    for offset in (1, 2):
        initializer = keras.initializers.HeNormal(seed + offset)
        hidden = keras.layers.Dense(128, "relu", kernel_initializer=initializer)(hidden)
    return keras.Model(z, keras.layers.Dense(2, kernel_initializer=keras.initializers.HeNormal(seed))(hidden))


# name: changes of the settings
VARIANTS = {
    "the recipe": {},
    "targets not averaged": {"dde_class": PlainDDE},
    "one noise level, 0.1": {"noise_std": 0.1},
    "levels from 0.1 on": {"noise_std": (0.1, 1.5)},
    "levels not weighted": {"level_power": 0},
    "no dual term": {"dual_weight": 0.0},
    "independent latents": {"egm_class": PlainEGM},
    "no moving average": {"average_decay": 0.0},
    "two steps for each DDE": {"dde_steps": 2, "real_steps": 2},
    "no Fourier features of points": {"num_features": 0},
    "features not damped": {"layers": {networks.RandomFourierFeatures: UndampedFeatures}},
    "no base measure": {"layers": {networks.GaussianLogDensity: FlatLogDensity}},
    "generator starts at random": {"build_generator": build_wide_generator},
    "one latent a point": {"latents_per_point": 1},
    "both DDEs with the same start and noise": {"fake_seed": 0},
    "more sources: 4096 real, 1536 generated": {"sources_per_point": (8, 3)},
    "a generator that can tear": {"build_generator": partial(build_generator, num_jumps=16)},
}


def train(
    dataset,
    seed,
    steps,
    noise_std=train_models.NOISE_RANGE,
    dual_weight=1.0,
    num_features=None,
    fake_seed=1,
    build_generator=build_generator,
    dde_class=DDE,
    egm_class=EGM,
    sources_per_point=(1, 1),  # of both DDEs
    layers=(),  # classes of layers of the energy networks, and those to put in their places
    **options,
):
    """Train the recipe with some settings changed; return the model."""

    def replace(layer):
        return dict(layers).get(type(layer), type(layer)).from_config(layer.get_config())

    def build_dde(seed, sources_per_point):
        net = build_energy_net(2, isinstance(noise_std, tuple), num_features=num_features, seed=seed)
        if layers:
            net = keras.models.clone_model(net, clone_function=replace)
        return dde_class(net, noise_std, dual_weight, seed, sources_per_point)

    options = {**train_models.EGM_OPTIONS, **options}
    ddes = map(build_dde, (seed, seed + fake_seed), sources_per_point)
    model = egm_class(*ddes, build_generator(seed=seed), seed=seed, **options)
    train_models.compile_egm(model, steps)
    batches = train_models.make_batches(dataset, seed).batch(sources_per_point[0])  # (number, batch size, 2)
    model.fit(batches.map(lambda x: tf.reshape(x, (-1, 2))), steps_per_epoch=steps, verbose=0)
    return model


def run(variant, dataset, seed, steps):
    """Train and evaluate once; return a dict of numbers."""
    try:
        model = train(dataset, seed, steps, **VARIANTS[variant])
        row = train_models.measure(dataset, model, seed, n_samples=1_000_000)
    except (FloatingPointError, ValueError) as error:  # a run that diverges is a result, too
        print(f"{variant}, {dataset}, seed {seed}: {error}", file=sys.stderr)
        row = {"density_tv": 1.0, "generator_tv": 1.0, "generator_kl": float("inf")}
    return {"variant": variant, "dataset": dataset, "seed": seed, "steps": steps, **row}


def write_table(rows, is_kept=False):
    """Write the means over seeds, for each data set, and their spread; kept runs keep their date and machine."""
    datasets = [dataset for dataset in DATASETS if any(row["dataset"] == dataset for row in rows)]
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in rows)]
    tables = []
    for title, names in TABLES.items():
        lines = []
        for variant in variants:
            cases = ([row for row in rows if (row["variant"], row["dataset"]) == (variant, each)] for each in datasets)
            cells = (" / ".join(report.summarise(its_rows, name, 3) for name in names) for its_rows in cases)
            lines.append([variant, *cells])
        tables.append(report.make_table([title, *(f"`{dataset}`" for dataset in datasets)], lines))
    seeds, steps = (", ".join(sorted({row[name] for row in rows})) for name in ("seed", "steps"))
    runs = f"Mean (smallest to largest) over seeds {seeds}; {steps} steps."
    text = "\n\n".join([*tables, f"{runs} {report.find_run_line('ablation', ('tensorflow', 'keras'), is_kept)}"])
    report.write_section("ablation", text)


def main():
    """Run what is asked for and write the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=DATASETS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tables_only:
        for variant in arguments.variants:
            for dataset in arguments.datasets:
                for seed in range(arguments.seeds):
                    row = run(variant, dataset, seed, arguments.steps)
                    report.add_row(FILE, row, key=("variant", "dataset", "seed", "steps"))
    write_table(report.read_rows(FILE), arguments.tables_only)


if __name__ == "__main__":
    main()
