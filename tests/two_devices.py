"""Train on two devices and print what came of it: the program that tests run, with the names of the cases.

It is a program of its own because devices are set up before TensorFlow starts, and because collective operations of a
second strategy in one process would meet those of the first.
"""

import json
import operator
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np
import tensorflow as tf

from egm_dde import draws
from energy_models import DDE, EGM, build_energy_net, build_generator

NUM_POINTS, BATCH_SIZE = 203, 50
DRAW_KEY = draws.draw_key


def make_model(kind, noise_std=(0.2, 1.5), gen_learning_rate=0.05):
    def make_dde(seed):
        net = build_energy_net(2, isinstance(noise_std, tuple), (8,), num_features=4, seed=seed)
        return DDE(net, noise_std, seed=5)

    sgd = keras.optimizers.SGD
    if kind == "DDE":
        model = make_dde(1)
        model.compile(sgd(0.05))
    else:
        generator = build_generator(widths=(8,), num_features=4, seed=3)
        model = EGM(make_dde(1), make_dde(2), generator, dde_steps=1, seed=6)
        model.compile(sgd(0.05), sgd(gen_learning_rate))
    return model


def largest_difference(arrays, others):
    return max(float(np.abs(np.subtract(array, other)).max()) for array, other in zip(arrays, others, strict=True))


def weights_of(*names):
    """The weights of networks, and with an EGM's generator its averages, without the step counters."""
    parts = [operator.attrgetter(name) for name in names]
    return lambda model: [weight for part in parts for weight in part(model).get_weights()] + [
        average.numpy() for average in getattr(model, "averages", ()) if "generator" in names
    ]


def compare_step(strategy, x, weights, kind, *options):
    """Difference of a step from the mean of the steps that each device alone would take on its half of the batch."""
    with strategy.scope():
        model = make_model(kind, *options)
    start = weights(model)
    logs = model.fit(x[:BATCH_SIZE], batch_size=BATCH_SIZE, shuffle=False, verbose=0).history
    ends, losses = [], []
    for replica, half in enumerate(np.split(x[:BATCH_SIZE], 2)):

        def draw_key(*purpose, replica=replica):
            return tf.random.fold_in(DRAW_KEY(*purpose), tf.constant(replica, tf.int64), alg="philox")

        with mock.patch.object(draws, "draw_key", draw_key):
            alone = make_model(kind, *options)
            losses.append(alone.train_on_batch(half, return_dict=True))
        ends.append(weights(alone))
    name = "loss" if kind == "DDE" else "loss_dde_real"
    return {
        "moved": largest_difference(start, weights(model)),
        "replicas": largest_difference(*ends),
        "weights": largest_difference(weights(model), [np.mean(pair, 0) for pair in zip(*ends, strict=True)]),
        "losses": abs(logs[name][0] - np.mean([each[name] for each in losses])),
    }


def compare_replicas(strategy, x):
    """Largest difference of the weights between the devices after training."""
    with strategy.scope():
        model = make_model("EGM")
    start = model.get_weights()
    model.fit(x, batch_size=BATCH_SIZE, epochs=3, verbose=0)
    copies = strategy.run(lambda: [tf.identity(weight) for weight in model.weights])  # and the step counters
    copies = [[part.numpy() for part in strategy.experimental_local_results(copy)] for copy in copies]
    return {
        "moved": largest_difference(start, model.get_weights()),
        "difference": largest_difference(*zip(*copies, strict=True)),
        "steps": model.num_steps,
        "evaluation": np.isfinite(list(model.evaluate(x, return_dict=True, verbose=0).values())).all().item(),
    }


def resume(strategy, x):
    """Difference of an interrupted and restored run, and of its file, from an uninterrupted one."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def make():
        with strategy.scope():
            return make_model("EGM")

    options = {"batch_size": BATCH_SIZE, "epochs": 3, "verbose": 0}
    expected = make()
    expected.fit(x, **options)
    with tempfile.TemporaryDirectory() as folder:
        backup = keras.callbacks.BackupAndRestore(Path(folder) / "backup")
        try:
            make().fit(x, callbacks=[backup, Interrupt()], **options)
        except KeyboardInterrupt:
            restored = make()
        epochs = restored.fit(x, callbacks=[backup], **options).epoch
        restored.save(Path(folder) / "model.keras")
        loaded = EGM.load(Path(folder) / "model.keras")
    return {
        "epochs": epochs,
        "weights": largest_difference(expected.get_weights(), restored.get_weights()),
        "file": largest_difference(restored.get_weights(), loaded.get_weights()),
    }


def refuse(strategy, x):
    """What is said of options that fail on several devices, and of training that diverges."""
    with strategy.scope():
        model = make_model("DDE")
    messages = []

    def note(error_class, method, *arguments, **options):
        try:
            method(*arguments, **options)
        except error_class as error:
            messages.append(str(error))

    with strategy.scope():
        note(ValueError, model.compile, jit_compile=True)
        note(ValueError, model.compile, steps_per_execution=2)
    note(ValueError, model.fit, x, batch_size=51)
    note(ValueError, model.fit, x, batch_size=204)
    x = x.copy()
    x[60, 1] = np.nan
    batches = tf.data.Dataset.from_tensor_slices(x).batch(BATCH_SIZE)
    note(FloatingPointError, model.fit, batches, verbose=0)
    return {"messages": messages, "finite": all(np.isfinite(weight).all().item() for weight in model.get_weights())}


def learn_gaussian(strategy):
    """Share of the score of a Gaussian that a DDE gets wrong, trained on one device and on two."""
    covariance = np.array([[1.0, 0.6], [0.6, 0.8]])
    x = np.random.default_rng(1).multivariate_normal([0.0, 0.0], covariance, 20_000).astype(np.float32)
    exact = -x @ np.linalg.inv(covariance + 0.3**2 * np.eye(2))
    errors = []
    for scope in (tf.distribute.get_strategy().scope(), strategy.scope()):
        with scope:
            dde = DDE(build_energy_net(2, False, (32, 32), seed=0), 0.3, seed=1)
            dde.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(5e-3, 500)))
        dde.fit(x, batch_size=1000, epochs=25, verbose=0)
        errors.append(float(np.mean((dde.score(x) - exact) ** 2) / np.mean(exact**2)))
    return errors


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    x = np.random.default_rng(0).standard_normal((NUM_POINTS, 2)).astype(np.float32)
    cases = {
        "DDE": lambda: compare_step(strategy, x, weights_of("net"), "DDE"),
        "DDE of one level": lambda: compare_step(strategy, x, weights_of("net"), "DDE", 0.3),
        "EGM": lambda: compare_step(strategy, x, weights_of("dde_real.net", "generator"), "EGM"),
        "dde_fake": lambda: compare_step(strategy, x, weights_of("dde_fake.net"), "EGM", (0.2, 1.5), 0.0),
        "replicas": lambda: compare_replicas(strategy, x),
        "resumed": lambda: resume(strategy, x),
        "refused": lambda: refuse(strategy, x),
        "gaussian": lambda: learn_gaussian(strategy),
    }
    results = {case: cases[case]() for case in sys.argv[1:]}
    print(json.dumps(results))
