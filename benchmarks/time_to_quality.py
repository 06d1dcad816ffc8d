"""Total variation against training time: the published recipe and ours, in one run.

The published recipe (networks, noise, batch, learning rates, inner steps, 10,000 points) is built with our classes, so
that the difference is the recipe's alone. It is run in full by default, which takes half an hour or more; results are
written after every measurement, so a run can be stopped at any time.

    python benchmarks/time_to_quality.py [--dataset 2spirals] [--published-steps 4000] [--seed 0]
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np
import report
import tensorflow as tf

from egm_dde import evaluation
import train_models
from energy_models import DDE, EGM
from utils import DATASETS, sample_2d_data

NOISE_STD = 0.1
FIRST_MEASUREMENT = 50  # steps; measurements are spaced evenly on a logarithmic scale from here on
MEASUREMENTS_PER_DOUBLING = 4


def build_published_egm(seed):
    """Build the published tutorial's model; ours has one output instead of ten, and losses that are means."""

    def build_mlp(widths, activation, num_outputs, use_bias):
        layers = [
            keras.layers.Dense(width, activation, kernel_initializer=keras.initializers.HeNormal(seed + index))
            for index, width in enumerate(widths)
        ]
        return keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(num_outputs, use_bias=use_bias)])

    keras.utils.set_random_seed(seed)
    ddes = [
        DDE(build_mlp((1024, 512, 256, 128, 64, 32), "tanh", 1, False), NOISE_STD, seed=seed + index)
        for index in range(2)
    ]
    generator = build_mlp((32, 64, 128, 256), "relu", 2, True)
    model = EGM(*ddes, generator, dde_steps=5, latents_per_point=1, average_decay=0.0, seed=seed)
    model.compile(keras.optimizers.Adam(1e-3), keras.optimizers.Adam(1e-5))
    return model


def measured_steps(num_steps):
    """Return the numbers of steps after which to measure, the last one included."""
    doublings = np.arange(0, np.log2(num_steps / FIRST_MEASUREMENT), 1 / MEASUREMENTS_PER_DOUBLING)
    return sorted({*(FIRST_MEASUREMENT * 2**doublings).astype(int).tolist(), num_steps})


def train_and_measure(model, batches, num_steps, dataset, seed):
    """Train, and yield (seconds of training, total variation) at the measured steps; compilation is not counted."""
    iterator = iter(batches)
    model.make_train_function()
    model.train_function(iterator)  # compiles; counted as a step, but not its time
    seconds, step = 0.0, 1
    for next_step in measured_steps(num_steps):
        start = time.perf_counter()
        while step < next_step:
            model.train_function(iterator)
            step += 1
        model.generator.weights[-1].numpy()  # wait for the last step
        seconds += time.perf_counter() - start
        samples = model.sample(2_000_000, seed=seed)
        total_variation = evaluation.sample_metrics(samples, dataset, NOISE_STD, seed).total_variation
        print(f"{step} steps, {seconds:.1f} s: {total_variation.value:.4f}", file=sys.stderr, flush=True)
        yield seconds, total_variation.value


def time_to_reach(curve, target):
    """Return the seconds after which a curve is at or below a target for the first time; NaN if never."""
    return next((seconds for seconds, value in curve if value <= target), float("nan"))


def plot(curves, path):
    """Draw the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        ax.loglog(*np.transpose(curve), ".-", label=name)
    ax.set(xlabel="seconds of training", ylabel="total variation of the generated samples")
    ax.grid(which="both", alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=80)


def write_results(curves, arguments):
    """Write picture and table."""
    plot(curves, report.FOLDER / "time_to_quality.png")
    ours, published = curves["ours"], curves["published"]
    rows = []
    for seconds, value in published:
        reached = time_to_reach(ours, value)
        rows.append((f"{seconds:.0f} s", f"{value:.3f}", f"{reached:.1f} s", f"{seconds / reached:.0f}"))
    every = max(1, len(rows) // 8)
    rows = rows[::-1][::every][::-1]  # the last one is always shown
    steps = measured_steps(arguments.published_steps)[len(published) - 1]
    header = ["Published recipe after", "Total variation", "Ours is there after", "Times faster"]
    text = (
        "![total variation against seconds](time_to_quality.png)\n\n"
        f"{report.make_table(header, rows)}\n\n"
        f"Ours goes on to {ours[-1][1]:.3f} after {ours[-1][0]:.0f} s. Data set {arguments.dataset}, seed "
        f"{arguments.seed}, {steps} of the 4000 steps of the published recipe.\n\n"
        f"{report.describe_run(['tensorflow', 'keras'])}"
    )
    report.write_section("time to quality", text)


def main():
    """Measure, and write the section of README.md and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="2spirals", choices=DATASETS)
    parser.add_argument("--published-steps", type=int, default=4000, help="1000 epochs of 4 batches")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dataset, seed = arguments.dataset, arguments.seed

    curves = {"ours": [], "published": []}
    num_steps = train_models.EPOCHS * train_models.STEPS_PER_EPOCH
    batches = train_models.make_batches(dataset, seed)
    curves["ours"] += train_and_measure(train_models.build_egm(seed), batches, num_steps, dataset, seed)
    published = build_published_egm(seed)
    points = sample_2d_data(dataset, 10_000, seed)
    batches = tf.data.Dataset.from_tensor_slices(points).shuffle(10_000, seed=seed).repeat().batch(2048)
    for measured in train_and_measure(published, batches, arguments.published_steps, dataset, seed):
        curves["published"].append(measured)
        write_results(curves, arguments)


if __name__ == "__main__":
    main()
