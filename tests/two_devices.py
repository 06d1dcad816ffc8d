"""Train on two devices and on one, and print how the results compare: the program that a test runs.

It is a program of its own because devices are set up before TensorFlow starts, and because collective operations of a
second strategy in one process would meet those of the first.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np
import tensorflow as tf

import energy_models
from energy_models import DDE, EGM, build_energy_net, build_generator
from utils import sample_2d_data

NUM_POINTS = 203  # the last batch has three points, and one device two of them


def make_model(kind, noise_std, optimizer=keras.optimizers.SGD):
    def make_dde(seed):
        return DDE(
            build_energy_net(2, isinstance(noise_std, tuple), (8,), num_features=4, seed=seed), noise_std, seed=5
        )

    if kind == "DDE":
        model = make_dde(1)
        model.compile(optimizer(0.05))
    else:
        generator = build_generator(widths=(8,), num_features=4, seed=3)
        model = EGM(make_dde(1), make_dde(2), generator, dde_steps=2, seed=6)
        model.compile(optimizer(0.05), optimizer(0.05))
    return model


def compare(kind, noise_std, strategy, x):
    one = make_model(kind, noise_std)
    with strategy.scope():
        two = make_model(kind, noise_std)
    start = one.get_weights()
    histories = [model.fit(x, batch_size=50, epochs=2, verbose=0).history for model in (one, two)]
    evaluations = [model.evaluate(x, verbose=0, batch_size=50, return_dict=True) for model in (one, two)]
    return {
        "moved": largest_difference(start, one.get_weights()),
        "weights": largest_difference(one.get_weights(), two.get_weights()),
        "losses": max(largest_difference(histories[0][name], histories[1][name]) for name in histories[0]),
        "evaluations": max(abs(evaluations[0][name] - evaluations[1][name]) for name in evaluations[0]),
    }


def largest_difference(arrays, others):
    return max(float(np.abs(np.subtract(array, other)).max()) for array, other in zip(arrays, others, strict=True))


def compare_noise(strategy):
    """Whether the two devices draw different halves of what one device would draw."""
    dde = make_model("DDE", (0.2, 1.5))
    key = tf.constant([3, 4], tf.uint64)

    @tf.function
    def draw():
        def draw_part():
            x = tf.zeros((5, 2))
            return tf.concat(dde.add_noise(x, key, energy_models._Part(tf.shape(x)[0])), axis=-1)

        return strategy.run(draw_part)

    first, second = (part.numpy() for part in strategy.experimental_local_results(draw()))
    whole = tf.concat(dde.add_noise(tf.zeros((10, 2)), key), axis=-1)
    return {
        "whole": float(np.abs(np.concatenate([first, second]) - whole).max()),
        "smallest difference": float(np.abs(first - second).min()),
    }


def resume(strategy, x):
    """Difference of an interrupted and restored run on two devices from an uninterrupted one on one device."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    one = make_model("EGM", (0.2, 1.5))
    one.fit(x, batch_size=50, epochs=3, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        for callbacks in ([Interrupt()], []):
            with strategy.scope():
                two = make_model("EGM", (0.2, 1.5))
            backup = keras.callbacks.BackupAndRestore(Path(folder) / "backup")
            try:
                history = two.fit(x, batch_size=50, epochs=3, verbose=0, callbacks=[backup, *callbacks])
            except KeyboardInterrupt:
                pass
        two.save(Path(folder) / "two.keras")
        loaded = EGM.load(Path(folder) / "two.keras")
    return {
        "epochs": history.epoch,
        "weights": largest_difference(one.get_weights(), two.get_weights()),
        "file": largest_difference(two.get_weights(), loaded.get_weights()),
    }


def refuse(strategy, x):
    """What is said of options that fail on several devices, and of training that diverges."""
    messages = []
    for options in ({"jit_compile": True}, {"steps_per_execution": 2}):
        with strategy.scope():
            model = make_model("DDE", 0.3)
            try:
                model.compile(**options)
            except ValueError as error:
                messages.append(str(error))
    x[60, 1] = np.nan
    try:
        model.fit(tf.data.Dataset.from_tensor_slices(x).batch(50), verbose=0)
    except FloatingPointError as error:
        messages.append(str(error))
    return {"messages": messages, "finite": all(bool(np.isfinite(weight).all()) for weight in model.get_weights())}


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    x = sample_2d_data("8gaussians", NUM_POINTS, rng=0)
    results = {
        f"{kind} {noise_std}": compare(kind, noise_std, strategy, x)
        for kind in ("DDE", "EGM")
        for noise_std in (0.3, (0.2, 1.5))
    }
    results |= {"noise": compare_noise(strategy), "resumed": resume(strategy, x), "refused": refuse(strategy, x)}
    print(json.dumps(results))
