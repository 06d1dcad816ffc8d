"""Train on two devices and print what came of it: the program that tests run, with the names of the cases.

It is a program of its own because devices are set up before TensorFlow starts, and because collective operations of a
second strategy in one process would meet those of the first.
"""

import json
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
from keras.optimizers import SGD, Adam
from small_models import make_dde, make_egm, normal, values_of

from egm_dde import draws
from energy_models import EGM

NUM_POINTS, BATCH_SIZE = 203, 50
DRAW_KEY = draws.draw_key


def make_model(model_kind, dde_kind="range", gen_learning_rate=0.05, optimizer=SGD):
    if model_kind == "DDE":
        model = make_dde(dde_kind)
        model.compile(optimizer(0.05))
    else:
        model = make_egm(dde_kind, dde_steps=1)
        model.compile(optimizer(0.05), optimizer(gen_learning_rate))
    return model


def largest_difference(arrays, others):
    return max(float(np.abs(np.subtract(array, other)).max()) for array, other in zip(arrays, others, strict=True))


def weights_of(model, names):
    """The weights of networks, and with the generator its averages, without the step counters."""
    averages = values_of(model.averages) if "generator" in names else []
    return [weight for name in names for weight in model.networks[name].get_weights()] + averages


def compare_step(strategy, x, names, *options):
    """Difference of a step from the mean of the steps that each device alone would take on its half of the batch."""
    with strategy.scope():
        model = make_model(*options)
    start = weights_of(model, names)
    logs = model.fit(x[:BATCH_SIZE], batch_size=BATCH_SIZE, shuffle=False, verbose=0).history
    ends, losses = [], []
    for replica, half in enumerate(np.split(x[:BATCH_SIZE], 2)):

        def draw_key(*purpose, replica=replica):
            return tf.random.fold_in(DRAW_KEY(*purpose), tf.constant(replica, tf.int64), alg="philox")

        with mock.patch.object(draws, "draw_key", draw_key):
            alone = make_model(*options)
            losses.append(alone.train_on_batch(half, return_dict=True))
        ends.append(weights_of(alone, names))
    name, end = "loss" if "loss" in logs else "loss_dde_real", weights_of(model, names)
    return {
        "moved": largest_difference(start, end),
        "replicas": largest_difference(*ends),
        "weights": largest_difference(end, [np.mean(pair, 0) for pair in zip(*ends, strict=True)]),
        "losses": abs(logs[name][0] - np.mean([each[name] for each in losses])),
    }


def compare_replicas(strategy, x):
    """Largest difference of the weights between the devices after training."""
    with strategy.scope():
        model = make_model("EGM", optimizer=Adam)
    start = values_of(model.trainable_weights)
    model.fit(x, batch_size=BATCH_SIZE, epochs=3, verbose=0)
    copies = strategy.run(lambda: [tf.identity(weight) for weight in model.weights])  # and the step counters
    copies = [[part.numpy() for part in strategy.experimental_local_results(copy)] for copy in copies]
    return {
        "moved": largest_difference(start, values_of(model.trainable_weights)),
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
            return make_model("EGM", optimizer=Adam)

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


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    x = normal(NUM_POINTS, 3)
    cases = {
        "DDE": lambda: compare_step(strategy, x, ["net"], "DDE"),
        "DDE of one level": lambda: compare_step(strategy, x, ["net"], "DDE", "fixed"),
        "EGM": lambda: compare_step(strategy, x, ["dde_real", "generator"], "EGM"),
        "dde_fake": lambda: compare_step(strategy, x, ["dde_fake"], "EGM", "range", 0.0),
        "replicas": lambda: compare_replicas(strategy, x),
        "resumed": lambda: resume(strategy, x),
        "refused": lambda: refuse(strategy, x),
    }
    results = {case: cases[case]() for case in sys.argv[1:]}
    print(json.dumps(results))
