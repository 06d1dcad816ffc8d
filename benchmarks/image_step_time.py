"""Time of one training step of ``examples/images.ipynb``: operation by operation, and compiled by XLA.

The networks, batches and inner steps are the notebook's (but stacks have the plain generator of images). Every variant
has a process of its own, and they take turns: a machine that slows down slows them all down.

    python benchmarks/image_step_time.py
"""

import multiprocessing
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "examples")]

import numpy as np
from step_time import time_steps

from egm_dde.runtime import prepare_process

SHAPES = {
    "digits, 8 x 8": (8, 8, 1),
    "digits and clothes, 28 x 28": (28, 28, 1),
    "stacks of digits, 28 x 28": (28, 28, 3),
}
VARIANTS = {  # threads of an operation, 0 for one on each core, and whether XLA compiles the step
    "operations on one thread each": ("1", False),
    "operations on all cores": ("0", False),
    "XLA on all cores": ("0", True),
}
NUM_ROUNDS = 7
SECONDS_PER_ROUND = 4


def prepare(shape, num_threads, jit_compile):
    """Build the model of this process, and compile its step."""
    global model, iterator
    os.environ["TF_NUM_INTRAOP_THREADS"] = num_threads
    prepare_process()
    import tensorflow as tf

    from energy_models import EGM, build_image_generator
    from image_models import BATCH_SIZE, build_density

    images = np.random.default_rng(0).uniform(-1, 1, (1000, *shape)).astype(np.float32)
    dde_real, dde_fake = (build_density(images, (0.1, 9.0), seed, is_stacked=shape[-1] > 1) for seed in (0, 1))
    dde_real.trainable = False
    generator = build_image_generator(images, latent_dim=32)
    model = EGM(dde_real, dde_fake, generator, latents_per_point=4, level_power=2, seed=0)
    model.compile(jit_compile=jit_compile)
    iterator = iter(tf.data.Dataset.from_tensors(images[:BATCH_SIZE]).repeat())
    model.make_train_function()
    measure(2)


def measure(num_steps):
    """Return the seconds of a step of the model of this process."""
    return time_steps(model, iterator, num_steps)


def main():
    """Measure, and write the section of README.md."""
    import report

    context = multiprocessing.get_context("spawn")
    rows = []
    for name, shape in SHAPES.items():
        pools = [context.Pool(1, prepare, (shape, *variant)) for variant in VARIANTS.values()]
        seconds = [pool.apply(measure, (3,)) for pool in pools]
        num_steps = [max(1, int(SECONDS_PER_ROUND / each)) for each in seconds]
        rounds = np.array(
            [
                [pool.apply(measure, (num,)) for pool, num in zip(pools, num_steps, strict=True)]
                for _ in range(NUM_ROUNDS)
            ]
        )
        for pool in pools:
            pool.terminate()
        ratios = rounds[:, :-1] / rounds[:, -1:]  # others / XLA, in the same round
        rows.append(
            [
                name,
                *(f"{1e3 * value:.0f} ms" for value in np.median(rounds, axis=0)),
                *(f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})" for ratio in ratios.T),
            ]
        )
        print(rows[-1], file=sys.stderr)
    header = ["Images", *VARIANTS, *(f"{variant} / XLA" for variant in list(VARIANTS)[:-1])]
    text = f"{report.make_table(header, rows)}\n\n{report.describe_run(['tensorflow', 'keras'])}"
    report.write_section("image step time", text)


if __name__ == "__main__":
    main()
