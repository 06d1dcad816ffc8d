"""Quality of the recipe on every data set over several seeds: the results tables of both READMEs.

Every run trains the model that the notebook trains, with other weights, data, noise and latents for every seed, and is
measured against the exact density. No run is left out. Each is added to ``quality.csv`` as it ends.

    python benchmarks/quality.py [--seeds 0 1 2 ...] [--datasets rings ...] [--tables-only]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "examples")]

import numpy as np
import report
import samples

import train_models
from utils import DATASETS

FILE = report.FOLDER / "quality.csv"

NUMBERS = [  # name in the table, name in the rows, digits
    ("Real DDE: TV", "density_tv", 3),
    ("Real DDE: KL (nats)", "density_kl", 4),
    ("Generator: TV", "generator_tv", 3),
    ("its floor", "generator_tv_floor", 3),
    ("Generator: KL (nats)", "generator_kl", 4),
    ("its floor", "generator_kl_floor", 4),
    ("Sliced Wasserstein-1", "sliced_wasserstein", 4),
    ("its floor", "sliced_wasserstein_floor", 4),
    ("as a multiple of it", "sliced_wasserstein_ratio", 2),
    ("standard error of that", "sliced_wasserstein_ratio_std_error", 2),
    ("Corrected points: TV", "corrected_tv", 3),
    ("its floor", "corrected_tv_floor", 3),
    ("Corrected points: KL (nats)", "corrected_kl", 4),
    ("its floor", "corrected_kl_floor", 4),
    ("Sliced Wasserstein-1 as a multiple of its floor", "corrected_sliced_w1_ratio", 2),
    ("standard error of that", "corrected_sliced_w1_ratio_std_error", 2),
    ("Smallest mode share", "smallest_mode_share", 4),
    ("Largest mode share", "largest_mode_share", 4),
    ("Training (CPU s)", "seconds", 0),
]


def run(dataset, seed):
    """Train and evaluate once; return a dict of numbers."""
    start = time.process_time()
    model = train_models.train_egm(dataset, seed)
    seconds = time.process_time() - start  # of both cores together: other work on the machine does not count
    row = {"dataset": dataset, "seed": seed, "seconds": seconds, **train_models.measure(dataset, model, seed)}
    corrected = samples.measure(dataset, model.sample(2_000_000, seed, corrected=True), seed)
    return {**row, **{f"corrected_{name}": number for name, number in corrected.items()}}


def write_results(rows, run_line):
    """Write the tables: everything to the README of the benchmarks, the means of TV to that of the project."""
    by_dataset = {dataset: [row for row in rows if row["dataset"] == dataset] for dataset in DATASETS}
    by_dataset = {dataset: its_rows for dataset, its_rows in by_dataset.items() if its_rows}
    table = report.make_table(
        ["", *(f"`{dataset}`" for dataset in by_dataset)],
        [
            [title, *(report.summarise(its_rows, name, digits) for its_rows in by_dataset.values())]
            for title, name, digits in NUMBERS
        ],
    )
    seeds = sorted({int(row["seed"]) for row in rows})
    runs = f"over seeds {seeds[0]} to {seeds[-1]}" if seeds[1:] else f"of one run, seed {seeds[0]}"
    report.write_section("quality", f"{table}\n\nMean (smallest to largest) {runs}. {run_line}")

    columns = {"density_tv": "Density", "generator_tv": "Generator", "corrected_tv": "Corrected"}
    columns["generator_tv_floor"] = "Floor"
    table = report.make_table(
        ["TV", *columns.values()],
        [
            [f"`{dataset}`", *(f"{np.mean([float(row[name]) for row in its_rows]):.3f}" for name in columns)]
            for dataset, its_rows in by_dataset.items()
        ],
    )
    text = f"{table}\n\nMean {runs} ([their spread](benchmarks/README.md#quality)). {run_line}"
    report.write_section("results", text, report.FOLDER.parent / "README.md")


def main():
    """Run, and write the section of README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=DATASETS)
    parser.add_argument("--tables-only", action="store_true", help="of the runs in quality.csv")
    arguments = parser.parse_args()
    for seed in [] if arguments.tables_only else arguments.seeds:
        for dataset in arguments.datasets:
            report.add_row(FILE, run(dataset, seed), key=("dataset", "seed"))
    run_line = report.find_run_line("quality", ["tensorflow", "keras", "numpy"], arguments.tables_only)
    write_results(report.read_rows(FILE), run_line)


if __name__ == "__main__":
    main()
