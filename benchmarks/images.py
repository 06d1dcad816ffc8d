"""Generated images, measured: the recipe of ``examples/images.ipynb`` over several seeds.

Of each run, 10,000 generated and as many corrected images are measured beside real ones, by a classifier that is
trained for it on the training images. The model is measured as it is kept, in half precision. Seed 0 is kept in
``examples/example_models/``, with a sheet of the first 100 images of each pool. Whole models and films of all seeds go
to ``build/images/``: what is there is not trained again.

    python benchmarks/images.py [--seeds 0 1 2] [--datasets mnist fashion_mnist] [--tables-only]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "examples")]

from egm_dde.runtime import prepare_process

os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "0")  # all cores share each operation
prepare_process()

import numpy as np
import report

import image_metrics
from egm_dde.visualization import GifCallback
from energy_models import DDE, EGM
from image_data import load_images, plot_images
from image_models import RECIPES, train_density, train_generator
from train_models import save_without_optimizers

FILE = report.FOLDER / "images.csv"
WORK = ROOT / "build" / "images"
MODELS, PICTURES = ROOT / "examples" / "example_models", ROOT / "examples" / "example_images"
NUM_IMAGES = 10_000  # of a pool
POOL_SEED, POOLS = 1, ("generated", "corrected")
NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "digits 8 x 8"}
NUMBERS = [  # name in the table, name in the rows, digits
    ("sure of", "sure", 3),
    ("KL of the shares (nats)", "divergence", 4),
    ("precision", "precision", 2),
    ("recall", "recall", 2),
    ("coverage", "coverage", 2),
    ("Fréchet distance", "frechet", 1),
    ("nearest training image", "distance", 2),
]


def run(dataset, seed, data_dir):
    """Train, keep and measure once; return the rows of what was generated, corrected, and of test images."""
    images, path = load_images(dataset, data_dir), WORK / f"{dataset}_{seed}.keras"
    if not path.exists():
        train(dataset, seed, images, path)
    egm = keep(EGM.load(path), MODELS / f"{dataset}.keras" if seed == 0 else path.with_suffix(".kept.keras"))
    pools = {name: egm.sample(NUM_IMAGES, seed=POOL_SEED, corrected=name == "corrected") for name in POOLS}
    pools["test images"] = images.test
    classifier = image_metrics.train_classifier(images.train, images.train_labels, seed)
    if seed == 0:
        shares = [image_metrics.class_shares(image_metrics.classify(classifier, x)[0]) for x in pools.values()]
        image_metrics.draw_sheet(pools, shares).savefig(PICTURES / f"{dataset}.png", dpi=100)
    key, training = {"dataset": dataset, "seed": seed}, read_json(path)
    return [
        {**key, "images": name, **image_metrics.measure(classifier, x, images.train, images.train_labels), **training}
        for name, x in pools.items()
    ]


def train(dataset, seed, images, path):
    """Train once; write the density, the model, its film, and how long each took."""
    density = path.with_suffix(".density.keras")
    if not density.exists():
        stopwatch = start_stopwatch()
        dde = train_density(images.train, RECIPES[dataset], seed)
        write_json(density, {"density_minutes": stopwatch()})
        dde.save(density)
    dde = DDE.load(density)
    copies = np.repeat(images.test, -(-NUM_IMAGES // len(images.test)), axis=0)  # each with a noise of its own
    loss = dde.evaluate(copies, batch_size=1000, verbose=0)
    print(f"{dataset}, seed {seed}: density trained, loss on test images {loss:.4f}", flush=True)
    film = GifCallback(path.with_suffix(".gif"), draw_film, size=464, num_colors=8)
    stopwatch = start_stopwatch()
    egm = train_generator(dde, images.train, RECIPES[dataset], seed, callbacks=[film])
    write_json(path, {**read_json(density), "test_loss": loss, "generator_minutes": stopwatch()})
    egm.save(path)


def start_stopwatch():
    """A function that returns the CPU minutes from now on, of all cores together: other work does not count."""
    start = time.process_time()
    return lambda: (time.process_time() - start) / 60


def write_json(path, numbers):
    """Write numbers beside a model."""
    path.with_suffix(".json").write_text(json.dumps(numbers))


def read_json(path):
    """Read the numbers beside a model."""
    return json.loads(path.with_suffix(".json").read_text())


def draw_film(ax, model):
    """Draw 64 generated images, always of the same latents."""
    plot_images(ax, model.sample(64, seed=POOL_SEED), num_columns=8)


def keep(egm, path):
    """Round a model to half precision, write it, and return what was written."""
    for weight, average in zip(egm.generator.weights, egm.averages, strict=True):
        weight.assign(average)  # what samples come from
    save_without_optimizers(egm, path, half=True)
    return EGM.load(path)


def write_results(rows, run_line):
    """Write the table of all runs to the README of the benchmarks."""
    header = ["Images", "Runs", *(name for name, _, _ in NUMBERS), "Training (CPU min)"]
    lines = []
    for dataset, name in NAMES.items():
        for kind in (*POOLS, "test images"):
            found = [row for row in rows if row["dataset"] == dataset and row["images"] == kind]
            cells = [report.summarise(found, column, digits) for _, column, digits in NUMBERS]
            minutes = [float(row["density_minutes"]) + float(row["generator_minutes"]) for row in found]
            if found:
                lines.append([f"{name}, {kind}", len(found), *cells, report.describe_spread(minutes, "{:.0f}".format)])
    report.write_section("images", f"{report.make_table(header, lines)}\n\n{run_line}")


def main():
    """Train what is asked for, and write the section of README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--datasets", nargs="*", default=["mnist", "fashion_mnist"], choices=list(NAMES))
    parser.add_argument("--data-dir", default="data", help="folder of local files")
    parser.add_argument("--tables-only", action="store_true", help="write the table of the runs in images.csv")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    run_line = report.find_run_line("images", ["tensorflow", "keras", "prdc"], arguments.tables_only)
    for dataset in [] if arguments.tables_only else arguments.datasets:
        for seed in arguments.seeds:
            report.replace_run(FILE, {"dataset": dataset, "seed": seed}, run(dataset, seed, arguments.data_dir))
    write_results(report.read_rows(FILE), run_line)


if __name__ == "__main__":
    main()
