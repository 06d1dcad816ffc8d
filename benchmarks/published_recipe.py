"""The published tutorial's recipe and ours: quality against CPU seconds of training, on one core.

``PublishedEGM`` does what the code of github.com/siavashBigdeli/EGM-DDE does, oddities included, and is changed only
where Keras 3 refuses that code: the name of the learning rate, the shape of the inputs, a reshape that changes nothing,
and an optimizer that serves two networks. Ours is ``train_models.train_egm``. The clock counts what ``fit`` does, the
building of the step included, but no measurement. Each run has a process of its own and replaces its lines of
``published_recipe.csv``; table and picture are made of all lines.

    python benchmarks/published_recipe.py [--recipes ours published] [--seeds 0 1 2] [--steps 4000] [--tables-only]
"""

import argparse
import itertools
import multiprocessing
import sys
from functools import partial
from pathlib import Path
from time import process_time  # of all threads, whatever else the machine does

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "examples")]

from egm_dde.runtime import prepare_process

prepare_process()  # before TensorFlow is imported

import keras
import numpy as np
import report
import tensorflow as tf
from matplotlib.figure import Figure

import train_models
from egm_dde import evaluation
from utils import DATASETS, noisy_density_2d, sample_2d_data

CSV = "published_recipe.csv"
NOISE_STD = 0.1
BATCH_SIZE = 2048
DDE_STEPS = 5
STEPS_PER_EPOCH = 4  # 10,000 points, without those that fill no batch: the published data generator leaves them out
DOUBLINGS = np.arange(0, 8, 0.5)  # between measured steps and the last step
CHUNK_SIZE = 100_000  # generated at a time
RECIPES = ("ours", "published")
MEASURES = ("sample_tv", "sample_kl", "density_tv", "density_sum_tv")


class PublishedEGM(keras.Model):
    """The published generative model.

    Both energy networks end in ten outputs. The gradient of their sum is trained, and they are summed in the
    generator's loss, but the published code plots the first output alone as the log density. Losses are sums over
    the batch. One Adam serves both DDEs, so that it counts two steps where each of them takes one.
    """

    def __init__(self, seed):
        super().__init__()
        keras.utils.set_random_seed(seed)
        self.net_real, self.net_fake = (build_mlp((1024, 512, 256, 128, 64, 32), "tanh", 10) for _ in range(2))
        self.generator = build_mlp((32, 64, 128, 256), "relu", 2)
        self.dde_optimizer = keras.optimizers.Adam(1e-3)
        self.dde_optimizer.build(self.net_real.trainable_variables + self.net_fake.trainable_variables)
        self.compile(keras.optimizers.Adam(1e-5), jit_compile=False)  # the generator's
        self.optimizer.build(self.generator.trainable_variables)

    def train_step(self, points):
        """Take a generator step, then DDE_STEPS steps of each DDE on one batch of points and one of generated points.

        The generated points of the inner steps are those of before the generator's step; only the noise is fresh.
        """
        with tf.GradientTape() as tape:
            generated = self.generator(tf.random.normal((BATCH_SIZE, 2)))
            noisy, _ = add_noise(generated)
            gen_loss = tf.reduce_sum(self.net_fake(noisy) - self.net_real(noisy))
        variables = self.generator.trainable_variables
        self.optimizer.apply(tape.gradient(gen_loss, variables), variables)
        for _ in range(DDE_STEPS):
            loss_real = self.dde_step(self.net_real, *add_noise(points))
            loss_fake = self.dde_step(self.net_fake, *add_noise(generated))
        return {"loss_dde_real": loss_real, "loss_dde_fake": loss_fake, "gen_loss": gen_loss}

    def dde_step(self, net, noisy, target):
        """Take a step of a DDE; return its loss, of which the sum over the batch is trained, as a mean."""
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner_tape:
                inner_tape.watch(noisy)
                log_densities = net(noisy)  # (batch, 10)
            score = inner_tape.gradient(log_densities, noisy)  # of the sum of the outputs
            losses = tf.reduce_mean(tf.square(score - target), axis=-1)  # (batch,)
        variables = net.trainable_variables
        self.dde_optimizer.apply(tape.gradient(losses, variables), variables)
        return tf.reduce_mean(losses)

    def sample(self, n_samples, seed):
        z = np.random.default_rng(seed).standard_normal((n_samples, 2), dtype=np.float32)
        return np.concatenate([self.generator(z[i : i + CHUNK_SIZE]) for i in range(0, n_samples, CHUNK_SIZE)])


class Measurement(keras.callbacks.Callback):
    """``save`` a dict with what ``measure`` says of the model, before the first and after ever more of the steps."""

    def __init__(self, measure, num_steps, save):
        super().__init__()
        self.measure, self.save = measure, save
        self.steps_left = sorted(set((num_steps // 2**DOUBLINGS).astype(int).tolist()) - {0})

    def on_train_begin(self, logs=None):
        self.save({"step": 0, "seconds": 0.0, **self.measure(self.model)})
        self.start = process_time()

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if self.steps_left and step >= self.steps_left[0]:
            paused = process_time()
            self.save({"step": step, "seconds": paused - self.start, **self.measure(self.model)})
            self.steps_left = [later for later in self.steps_left if later > step]
            self.start += process_time() - paused


def build_mlp(widths, activation, num_outputs):
    """Build dense layers on points; no bias in the last, and the initial weights that both published builders get."""
    layers = [keras.layers.Dense(width, activation, kernel_initializer="glorot_normal") for width in widths]
    last = keras.layers.Dense(num_outputs, use_bias=False, kernel_initializer="glorot_normal")
    return keras.Sequential([keras.Input((2,)), *layers, last])


def add_noise(points):
    """Return noisy points and the target of their score, both (batch, 2)."""
    noise = tf.random.normal(tf.shape(points), stddev=NOISE_STD)
    return points + noise, -noise / NOISE_STD**2


def train_published(dataset, seed, num_steps, callback):
    """Train the published model: the same four batches in every epoch, in random order, as its ``fit`` does."""
    points = sample_2d_data(dataset, STEPS_PER_EPOCH * BATCH_SIZE, seed).reshape(STEPS_PER_EPOCH, BATCH_SIZE, 2)
    batches = tf.data.Dataset.from_tensor_slices(points).shuffle(STEPS_PER_EPOCH, seed=seed).repeat()
    options = {"epochs": -(-num_steps // STEPS_PER_EPOCH), "steps_per_epoch": STEPS_PER_EPOCH, "shuffle": False}
    PublishedEGM(seed).fit(batches, callbacks=[callback], verbose=0, **options)


def measure(model, arguments, seed):
    """Compare samples and density of a model with the exact density of the noisy data."""
    exact_density = partial(noisy_density_2d, arguments.dataset, noise_std=NOISE_STD)
    sample_real = partial(sample_2d_data, arguments.dataset)
    samples = model.sample(arguments.samples, seed=seed)
    distances = evaluation.sample_metrics(samples, exact_density, sample_real, NOISE_STD, seed)
    log_densities = [lambda x: model.net_real(x)[:, 0], lambda x: tf.reduce_sum(model.net_real(x), axis=-1)]
    if not isinstance(model, PublishedEGM):
        log_densities = [partial(model.dde_real.log_density, noise_std=NOISE_STD)]  # one output
    density_tvs = [evaluation.density_metrics(f, exact_density).total_variation for f in log_densities]
    names = ("sample_tv", "sample_tv_floor", "sample_kl", "sample_kl_floor", "density_tv", "density_sum_tv")
    return dict(zip(names, (*sum(distances, ()), density_tvs[0], density_tvs[-1]), strict=True))


def run(recipe, seed, arguments):
    """Train once and write each measurement to the csv file as it is made."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    key = {"recipe": recipe, "dataset": arguments.dataset, "seed": seed}
    rows = []

    def save(row):
        rows.append({**key, **row})
        print(rows[-1], file=sys.stderr, flush=True)
        report.replace_run(arguments.folder / CSV, key, rows)

    num_steps = arguments.steps if recipe == "published" else arguments.epochs * train_models.STEPS_PER_EPOCH
    callback = Measurement(partial(measure, arguments=arguments, seed=seed), num_steps, save)
    if recipe == "published":
        train_published(arguments.dataset, seed, num_steps, callback)
    else:
        train_models.train_egm(arguments.dataset, seed, arguments.epochs, callbacks=[callback])


def plot(runs, path):
    """Draw the curves of all seeds, with the untrained model's values as dotted lines."""
    for ax, name in zip(Figure((11, 3.6), layout="constrained").subplots(1, 3), MEASURES[:3], strict=True):
        for index, (recipe, its_runs) in enumerate(runs.items()):
            for run in its_runs:
                ax.plot(run["seconds"], run[name], f".-C{index}", linewidth=1, markersize=4)
                ax.axhline(run[name][0], color=f"C{index}", linestyle=":", linewidth=1)
            ax.plot([], [], f".-C{index}", label=recipe)
        ax.set_xscale("symlog", linthresh=10)  # step 0 has its place
        ax.set(yscale="log", xlabel="CPU seconds of training", title=name.replace("_", " "), xlim=(0, None))
    ax.legend()
    ax.figure.savefig(path, dpi=80)


def write_results(arguments):
    """Write picture and table of the rows in the csv file."""
    path = arguments.folder / "README.md"
    rows = np.genfromtxt(arguments.folder / CSV, delimiter=",", names=True, dtype=None, encoding="utf-8")
    rows = rows[rows["dataset"] == arguments.dataset]
    runs = {recipe: rows[rows["recipe"] == recipe] for recipe in RECIPES if recipe in rows["recipe"]}
    runs = {recipe: [its[its["seed"] == seed] for seed in np.unique(its["seed"])] for recipe, its in runs.items()}
    plot(runs, arguments.folder / "published_recipe.png")
    table = []
    for (recipe, its_runs), name in itertools.product(runs.items(), MEASURES):
        if (recipe, name) == ("ours", "density_sum_tv"):  # it has one output
            continue
        untrained, best, last = zip(*((run[0], run[run[name].argmin()], run[-1]) for run in its_runs), strict=True)
        numbers = ((untrained, name), (best, name), (best, "seconds"), (last, name), (last, "seconds"))
        numbers = (report.describe_spread([row[column] for row in reached]) for reached, column in numbers)
        table.append((f"{recipe}, {name.replace('_', ' ').replace('tv', 'TV').replace('kl', 'KL')}", *numbers))
    steps = ", ".join(f"{recipe} {len(its)} x {its[0]['step'][-1]}" for recipe, its in runs.items())
    text = (
        "![quality against CPU seconds of training](published_recipe.png)\n\n"
        f"{report.make_table(['', 'Untrained', 'Best', 'after (s)', 'Last', 'after (s)'], table)}\n\n"
        f"Mean (smallest to largest) over the seeds. Real samples: TV {rows['sample_tv_floor'].mean():.3f}, KL "
        f"{rows['sample_kl_floor'].mean():.3f}. Data set {arguments.dataset}; seeds x steps: {steps}. "
        f"{report.find_run_line('published recipe', ['tensorflow', 'keras'], arguments.tables_only, path)}"
    )
    report.write_section("published recipe", text, path)


def main():
    """Run, and write the section of README.md and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--dataset", default="2spirals", choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000, help="of the published recipe: 1000 epochs of 4")
    parser.add_argument("--epochs", type=int, default=train_models.EPOCHS, help="of ours")
    parser.add_argument("--samples", type=int, default=1_000_000, help="for each measurement")
    parser.add_argument("--folder", type=Path, default=report.FOLDER, help="of README.md, csv and picture")
    parser.add_argument("--tables-only", action="store_true", help="of the runs in published_recipe.csv")
    arguments = parser.parse_args()
    runs = itertools.product(arguments.recipes, arguments.seeds)
    for recipe, seed in () if arguments.tables_only else runs:
        process = multiprocessing.get_context("spawn").Process(target=run, args=(recipe, seed, arguments))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{recipe}, seed {seed}: the run ended with exit code {process.exitcode}")
    write_results(arguments)


if __name__ == "__main__":
    main()
