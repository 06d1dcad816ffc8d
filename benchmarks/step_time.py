"""Time of one training step: ours in TensorFlow, and the same step written the usual way in PyTorch and JAX.

Same networks and initial weights, batch, noise levels, inner steps and optimizers (two steps of each density and one
of the generator); each framework draws its own random numbers the way its users do, and has the same settings
of the memory allocator. Every framework has a process of its own, and they take turns: a machine that slows down slows
them all down. Before any time is taken, all must return the same losses on the same draws.

    python benchmarks/step_time.py
"""

import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "examples")]

import numpy as np

from egm_dde.runtime import prepare_process

BATCH_SIZE = 512
NUM_ROUNDS = 15
STEPS_PER_ROUND = 40
PRODUCT_SIZE = 2048
NUM_STEPS = 5000  # of the learning rates' decay
FRAMEWORKS = (
    "TensorFlow, prepare_process",
    "TensorFlow, default threads",
    "PyTorch, eager",
    "PyTorch, torch.compile",
    "JAX, jit",
)


def build_model(given=None, in_one_graph=False):
    """Build the compiled model whose step is measured; ``given`` are levels and noise to add, if not random."""
    import tensorflow as tf

    import train_models
    from energy_models import DDE, EGM, build_energy_net, build_generator

    class GivenDDE(DDE):
        def add_noise(self, x, key):
            if given is None:
                return super().add_noise(x, key)
            log_noise_std, noise = map(tf.constant, given)
            return x + tf.exp(log_noise_std) * noise, noise, tf.exp(log_noise_std)

    class OneGraphEGM(EGM):
        def as_subgraph(self, step):
            return step if in_one_graph else super().as_subgraph(step)

    nets = (build_energy_net(noise_conditional=True, seed=seed) for seed in (0, 1))
    ddes = (GivenDDE(net, train_models.NOISE_RANGE, seed=seed) for seed, net in enumerate(nets))
    model = OneGraphEGM(*ddes, build_generator(seed=2), dde_steps=2, seed=0)
    train_models.compile_egm(model, NUM_STEPS)
    return model


def time_steps(model, iterator, num_steps):
    """Take training steps of an ``EGM`` on batches; return the seconds of one, their mean."""
    start = time.perf_counter()
    for _ in range(num_steps):
        model.train_function(iterator)
    model.generator.weights[-1].numpy()  # wait for the last step
    return (time.perf_counter() - start) / num_steps


def prepare_tensorflow(problem):
    """Return ``run(num_steps)`` and ``losses`` of this framework."""
    import tensorflow as tf

    model = build_model()
    iterator = iter(tf.data.Dataset.from_tensor_slices(problem.batches).repeat().prefetch(tf.data.AUTOTUNE))
    model.make_train_function()

    def run(num_steps):
        time_steps(model, iterator, num_steps)

    def losses(x, z, log_noise_std, noise):
        given = build_model((log_noise_std, noise))
        return float(given.dde_real.denoising_loss(tf.constant(x), None)), float(given.generator_loss(z, None))

    return run, losses


def prepare_product():
    """Return ``run(num_steps)`` of a large float32 matrix product, this machine's practical best."""
    import tensorflow as tf

    matrix = tf.random.stateless_normal((PRODUCT_SIZE, PRODUCT_SIZE), (0, 0))
    multiply = tf.function(lambda a: a @ a)

    def run(num_steps):
        for _ in range(num_steps):
            multiply(matrix).numpy()

    return run


def count_flops(batch_size):
    """Count the floating-point operations of a step: those of all matrix products in its graph, 2 m n k each."""
    import tensorflow as tf

    model = build_model(in_one_graph=True)
    graph = tf.function(model.train_step).get_concrete_function(tf.TensorSpec((batch_size, 2))).graph
    flops = 0
    for operation in graph.get_operations():
        if "MatMul" in operation.type:  # of shapes (m, k), (k, n) and (m, n), whatever is transposed, perhaps in blocks
            shapes = [each.shape for each in (*operation.inputs, operation.outputs[0])]
            num_blocks = math.prod(shapes[0][:-2])
            flops += 2 * num_blocks * math.isqrt(math.prod(shape.num_elements() // num_blocks for shape in shapes))
    return flops


def serve(connection, framework, problem):
    """Run in a process of its own: answer ("losses", draws) and ("time", num_steps) until ("stop", None)."""
    if framework.endswith("default threads"):
        os.environ["TF_NUM_INTRAOP_THREADS"] = "0"  # which is set to 1 otherwise
    prepare_process()
    if framework.startswith("TensorFlow"):
        run, losses = prepare_tensorflow(problem)
        products = prepare_product()
    elif framework.startswith("PyTorch"):
        import peer_pytorch

        run, losses = peer_pytorch.prepare(problem, compiled="compile" in framework)
    else:
        import peer_jax

        run, losses = peer_jax.prepare(problem)
    while True:
        request, argument = connection.recv()
        if request == "stop":
            return
        if request == "losses":
            connection.send(losses(*argument))
            continue
        start = time.perf_counter()
        (products if request == "time product" else run)(argument)
        connection.send((time.perf_counter() - start) / argument)


def as_arrays(network):
    """Return a Keras network's frequencies (2, num_features) and layers, each [kernel] or [kernel, bias], as arrays."""
    frequencies, layers = None, []
    for layer in network.layers:
        arrays = layer.get_weights()
        if "fourier" in layer.name:
            (frequencies,) = arrays
        elif arrays:
            layers.append(arrays)
    return frequencies, layers


def build_problem():
    """Build what all frameworks are given: batches (100, batch, 2), initial weights as arrays, and the settings."""
    from utils import sample_2d_data

    model = build_model()
    return SimpleNamespace(
        batches=sample_2d_data("2spirals", 100 * BATCH_SIZE, 0).reshape(100, BATCH_SIZE, 2),
        net_real=as_arrays(model.dde_real.net),
        net_fake=as_arrays(model.dde_fake.net),
        generator=as_arrays(model.generator),
        noise_std=model.dde_real.noise_std,
        data_std=2.0,
        dde_steps=model.dde_steps,
        latents_per_point=model.latents_per_point,
        average_decay=model.average_decay,
        num_steps=NUM_STEPS,
    )


def check_losses(workers, problem):
    """Check that all frameworks compute the same two losses from the same draws.

    Raises:
        RuntimeError: if they do not, to five digits.
    """
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, BATCH_SIZE, 2), dtype=np.float32)
    log_noise_std = rng.uniform(*np.log(problem.noise_std), (BATCH_SIZE, 1)).astype(np.float32)
    expected = None
    for framework, worker in workers.items():
        worker.send(("losses", (problem.batches[0], z, log_noise_std, noise)))
        given = worker.recv()
        expected = expected or given
        if not np.allclose(given, expected, rtol=1e-5, atol=1e-5):
            raise RuntimeError(f"{framework} must compute the losses {expected}, got {given}")


def measure(workers):
    """Return seconds a step, rounds by framework, and seconds of the large product, rounds."""

    def ask(worker, request, argument):
        worker.send((request, argument))
        return worker.recv()

    for worker in workers.values():
        ask(worker, "time", 10)  # compile
    all_threads = workers["TensorFlow, default threads"]
    ask(all_threads, "time product", 3)
    seconds, product_seconds = [], []
    for _ in range(NUM_ROUNDS):
        seconds.append([ask(worker, "time", STEPS_PER_ROUND) for worker in workers.values()])
        product_seconds.append(ask(all_threads, "time product", 5))
    return np.array(seconds), np.array(product_seconds)


def main():
    """Measure, and write the section of README.md."""
    import report

    prepare_process()
    problem = build_problem()
    context = multiprocessing.get_context("spawn")
    workers = {}
    for framework in FRAMEWORKS:
        workers[framework], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, framework, problem), daemon=True).start()
    check_losses(workers, problem)
    seconds, product_seconds = measure(workers)
    for worker in workers.values():
        worker.send(("stop", None))

    flops = count_flops(BATCH_SIZE)
    speed = flops / np.median(seconds, axis=0)
    best_speed = 2 * PRODUCT_SIZE**3 / np.median(product_seconds)
    ratios = seconds[:, :1] / seconds  # ours / theirs, in the same round
    rows = [
        (
            framework,
            f"{1e3 * np.median(seconds[:, index]):.1f} ms",
            f"{1e3 * seconds[:, index].min():.1f} to {1e3 * seconds[:, index].max():.1f} ms",
            f"{np.median(ratios[:, index]):.2f}",
            f"{speed[index] / 1e9:.0f}",
            f"{speed[index] / best_speed:.0%}",
        )
        for index, framework in enumerate(FRAMEWORKS)
    ]
    header = ["Framework", "Step (median)", f"{NUM_ROUNDS} rounds", "Ours / theirs", "GFLOP/s", "Share of product"]
    text = (
        f"{report.make_table(header, rows)}\n\n"
        f"One step is {flops / 1e9:.2f} GFLOP of matrix products at batch {BATCH_SIZE}; "
        f"the {PRODUCT_SIZE} x {PRODUCT_SIZE} float32 product reaches {best_speed / 1e9:.0f} GFLOP/s here.\n\n"
        f"{report.describe_run(['tensorflow', 'keras', 'torch', 'jax', 'optax'])}"
    )
    report.write_section("step time", text)


if __name__ == "__main__":
    main()
