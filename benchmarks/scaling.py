"""How the time and memory of a training step grow with batch size, width and dimension.

Every setting has a process of its own, so that its peak memory is its own: the peak of the process minus what it took
before the first step.

    python benchmarks/scaling.py
"""

import multiprocessing
import resource
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "examples")]

import numpy as np
from step_time import time_steps

from egm_dde.runtime import prepare_process

DEFAULTS = {"batch size": 512, "width": 128, "dimension": 2}
SETTINGS = {
    "batch size": [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
    "width": [64, 128, 256, 512, 1024],
    "dimension": [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
}
MEBIBYTE = 2**20


def measure(setting):
    """Return the median seconds of a step and its peak memory in bytes."""
    prepare_process()
    import tensorflow as tf

    from energy_models import DDE, EGM, build_energy_net, build_generator

    batch_size, width, dim = setting["batch size"], setting["width"], setting["dimension"]

    def build_dde(seed):
        net = build_energy_net(dim, noise_conditional=True, widths=(width, width), data_std=1.0, seed=seed)
        return DDE(net, (0.1, 1.5), seed=seed)

    generator = build_generator(dim, dim, widths=(width, width), data_std=1.0)
    model = EGM(build_dde(0), build_dde(1), generator, dde_steps=2, seed=0)
    model.compile()
    points = np.random.default_rng(0).standard_normal((batch_size, dim), dtype=np.float32)
    iterator = iter(tf.data.Dataset.from_tensors(points).repeat())
    before = peak_memory()
    model.make_train_function()

    run = partial(time_steps, model, iterator)
    run(2)
    num_steps = max(1, min(20, int(1 / run(1))))
    return np.median([run(num_steps) for _ in range(5)]), peak_memory() - before


def peak_memory():
    """Return the peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot(results, path):
    """Draw time and memory against each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.subplots(2, len(SETTINGS), sharex="col", sharey="row")
    for column, (name, values) in enumerate(SETTINGS.items()):
        seconds, memory = np.transpose([results[name, value] for value in values])
        axes[0, column].loglog(values, 1e3 * seconds, "o-")
        axes[1, column].semilogx(values, memory / MEBIBYTE, "o-", color="tab:orange")
        axes[1, column].set_xlabel(name)
        axes[1, column].set_xticks(values, values, rotation=45)
        axes[1, column].minorticks_off()
        for ax in axes[:, column]:
            ax.axvline(DEFAULTS[name], color="gray", linestyle=":")
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("step, ms")
    axes[1, 0].set_ylabel("peak memory of the step, MiB")
    figure.savefig(path, dpi=80)


def main():
    """Measure, and write the section of README.md and its picture."""
    import report

    context = multiprocessing.get_context("spawn")
    results = {}
    for name, values in SETTINGS.items():
        for value in values:
            with context.Pool(1) as pool:
                results[name, value] = pool.apply(measure, ({**DEFAULTS, name: value},))
            print(f"{name} {value}: {1e3 * results[name, value][0]:.1f} ms", file=sys.stderr)
    plot(results, report.FOLDER / "scaling.png")
    tables = [
        report.make_table(
            [name.capitalize(), *values],
            [
                ["step, ms", *(f"{1e3 * results[name, value][0]:.1f}" for value in values)],
                ["peak memory, MiB", *(f"{results[name, value][1] / MEBIBYTE:.0f}" for value in values)],
            ],
        )
        for name, values in SETTINGS.items()
    ]
    picture = "![step time and memory against batch size, width and dimension](scaling.png)"
    report.write_section("scaling", "\n\n".join([picture, *tables, report.describe_run(["tensorflow", "keras"])]))


if __name__ == "__main__":
    main()
