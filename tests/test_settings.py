"""What Keras offers and a user sets is honoured, or refused with a sentence."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.callbacks import EarlyStopping, LearningRateScheduler, ModelCheckpoint, ReduceLROnPlateau
from keras.optimizers import SGD, Adam, AdamW, LossScaleOptimizer
from small_models import (
    assert_equal_arrays,
    compiled,
    ddes_of,
    dense_net,
    differ,
    make_dde,
    make_egm,
    normal,
    record_calls,
    values_of,
)

from egm_dde import sampling
from energy_models import DDE

X = normal(8, 3)


class AddedLoss(keras.layers.Layer):
    """Passes points on, and adds three times its only weight, 1.0, to the losses."""

    def build(self, _):
        self.weight = self.add_weight((), "ones")

    def call(self, x):
        self.add_loss(3.0 * self.weight)
        return x + 0.0 * self.weight


class Recorder(keras.layers.Layer):
    """Keeps whether it was called in training, and on how many points."""

    def __init__(self):
        super().__init__()
        self.is_training, self.num_points = [], []

    def call(self, x, training=None):
        self.is_training.append(training)
        self.num_points.append(x.shape[0])
        return x


def model_with(place, *layers, **options):
    """A DDE ("net") or an EGM, one of whose networks has layers and options of its own."""
    net = dense_net(3 if place == "generator" else 1, *layers, **options)
    if place == "net":
        return make_dde(net=net)
    return make_egm(dde_steps=1, **{place: net if place == "generator" else make_dde(net=net)})


# ---------------------------------------------------------------------------------------------- losses of layers


@pytest.mark.parametrize("place", ["net", "dde_real", "dde_fake", "generator"])
def test_losses_of_layers_are_descended_and_not_reported(place):
    # A step of size 0.1 moves a weight with the penalty 2 w^2 by -0.4 w more than without, one with 3 w by -0.3.
    weights, logs = [], []
    for options in ({}, {"kernel_regularizer": keras.regularizers.L2(2.0)}):
        model = compiled(model_with(place, AddedLoss(), **options), lambda: SGD(0.1), run_eagerly=place != "net")
        added, dense, _ = model.networks[place].layers
        before = dense.get_weights()[0]
        logs.append(model.train_on_batch(X, return_dict=True))
        np.testing.assert_allclose(added.get_weights(), [0.7], rtol=1e-6)
        weights.append(dense.get_weights()[0])
    np.testing.assert_allclose(weights[1] - weights[0], -0.4 * before, rtol=1e-3, atol=1e-6)
    if place != "generator":  # the fake DDE learns what the generator makes after its step
        assert logs[0] == logs[1]


# ---------------------------------------------------------------------------------------------- optimizers


def moves(make_model, make_optimizer):
    """How the weights of all networks move in six steps."""
    model = compiled(make_model(), make_optimizer)
    before = values_of(model.trainable_weights)
    model.fit(X, batch_size=4, epochs=3, verbose=0)
    return [new - old for old, new in zip(before, values_of(model.trainable_weights), strict=True)]


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_scaled_losses_give_the_same_steps(make_model):
    expected = moves(make_model, lambda: SGD(0.1))
    assert all(np.abs(move).max() > 1e-3 for move in expected)
    for scaled in (lambda: SGD(0.1, loss_scale_factor=1024), lambda: LossScaleOptimizer(SGD(0.1))):
        for move, reference in zip(moves(make_model, scaled), expected, strict=True):
            np.testing.assert_allclose(move, reference, rtol=1e-4, atol=1e-6)


def test_a_loss_scale_that_grew_too_large_is_lowered_and_is_no_error():
    optimizer = LossScaleOptimizer(SGD(0.1), initial_scale=1e38)
    dde = compiled(make_dde(), lambda: optimizer)
    before = dde.net.get_weights()
    dde.fit(1e3 * X, verbose=0)
    assert_equal_arrays(before, dde.net.get_weights())
    assert float(optimizer.dynamic_scale) < 1e38


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_accumulated_gradients_are_those_of_as_many_batches(make_model, monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    options = {"dde_steps": 1} if make_model is make_egm else {}
    model, reference = make_model(**options), make_model(**options)
    compiled(model, lambda: SGD(0.1, gradient_accumulation_steps=2), run_eagerly=True)
    weights = [[values_of(net.trainable_weights) for net in model.networks.values()]]
    for _ in range(4):
        model.train_on_batch(X)
        weights.append([values_of(net.trainable_weights) for net in model.networks.values()])
    for of_network in zip(*weights, strict=True):
        assert [differ(one, other) for one, other in itertools.pairwise(of_network)] == [False, True, False, True]
    dde, reference = (ddes_of(each)[0] for each in (model, reference))
    keys = [tuple(call["key"]) for call in calls if call["self"] is dde]
    assert len(set(keys)) == 4 == model.num_steps  # fresh noise in each, and other points: they follow from the steps
    with tf.GradientTape() as tape:
        loss = sum(reference.denoising_loss(tf.constant(X), tf.constant(key)) for key in keys[:2]) / 2
    gradients = tape.gradient(loss, reference.net.trainable_variables)
    for old, new, gradient in zip(weights[0][0], weights[2][0], gradients, strict=True):
        np.testing.assert_allclose(new - old, -0.1 * gradient, rtol=1e-3, atol=1e-6)


def test_a_dde_may_end_with_the_moving_average_of_its_optimizer():
    dde, plain = (
        compiled(make_dde(), lambda use=use: Adam(1e-2, use_ema=use, ema_momentum=0.5)) for use in (True, False)
    )
    for model in (dde, plain):
        model.fit(X, epochs=3, verbose=0)
    assert_equal_arrays(dde.trainable_weights, dde.optimizer._model_variables_moving_average)
    assert differ(dde.trainable_weights, plain.trainable_weights)


def test_optimizers_that_an_egm_cannot_use_are_refused():
    for place in ("dde_optimizer", "gen_optimizer", "real_optimizer"):
        for optimizer in (Adam(use_ema=True), LossScaleOptimizer(Adam(use_ema=True))):
            with pytest.raises(ValueError, match=f"{place} must not have use_ema=True.*by average_decay"):
                make_egm().compile(**{place: optimizer})
    with pytest.raises(ValueError, match="its own optimizer: give dde_optimizer and gen_optimizer"):
        make_egm().compile(optimizer="adam")


class InverseRoot(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that cannot be saved."""

    def __call__(self, step):
        return 0.1 / keras.ops.sqrt(1.0 + keras.ops.cast(step, "float32"))


def undecayed():
    """A decay that moves weights by itself, and leaves all of them out."""
    optimizer = AdamW(1e-9, weight_decay=1e8)
    optimizer.exclude_from_weight_decay(var_names=["kernel", "bias"])
    return optimizer


@pytest.mark.parametrize(
    ("make_optimizer", "low", "high"),
    [(lambda: SGD(InverseRoot()), 1e-3, 1), (lambda: SGD(lambda: 0.1), 1e-3, 1), (undecayed, 0, 1e-6)],
)
def test_optimizers_with_settings_of_their_own_keep_them_or_are_refused(make_optimizer, low, high):
    for move in moves(make_egm, make_optimizer):
        assert low <= np.abs(move).max() < high
    with pytest.raises(ValueError, match=r"real_optimizer must be a new .* in use and cannot be copied: "):
        make_egm().compile(make_optimizer())


# ---------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (LearningRateScheduler(lambda epoch: 0.0), "LearningRateScheduler sets one learning rate, and each network"),
        (ReduceLROnPlateau("loss_dde_real", mode="min"), "ReduceLROnPlateau sets one .* learning rate schedules"),
        (EarlyStopping("val_loss"), 'EarlyStopping watches val_loss, which is not logged.*monitor="loss_dde_real"'),
        (ModelCheckpoint("a.keras", save_best_only=True), "ModelCheckpoint watches val_loss"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_made_for_one_loss_or_rate_are_refused_by_an_egm(callback, message):
    egm = compiled(make_egm(), lambda: SGD(0.1))
    before = egm.get_weights()
    for callbacks in (callback, [callback], keras.callbacks.CallbackList([callback])):
        with pytest.raises(ValueError, match=message):
            egm.fit(X, verbose=0, callbacks=callbacks)
    assert_equal_arrays(before, egm.get_weights())


def test_callbacks_do_what_they_are_made_for(tmp_path):
    dde = compiled(make_dde(), lambda: SGD(0.1))
    before = dde.net.get_weights()
    dde.fit(X, verbose=0, callbacks=[LearningRateScheduler(lambda epoch: 0.0), EarlyStopping("loss", mode="min")])
    assert_equal_arrays(before, dde.net.get_weights())
    egm = compiled(make_egm(), lambda: SGD(0.1), run_eagerly=True)
    stop = EarlyStopping("loss_dde_real", mode="min", min_delta=1e3)
    callbacks = [stop, ModelCheckpoint(tmp_path / "{epoch}.keras")]
    assert egm.fit(X, verbose=0, epochs=5, callbacks=callbacks).epoch == [0, 1]
    assert (tmp_path / "2.keras").exists()


# ---------------------------------------------------------------------------------------------- networks


class Unregistered(keras.Model):
    """A generator that Keras cannot copy: it does not know how to make another one."""

    def __init__(self, width):
        super().__init__()
        self.dense = keras.layers.Dense(width)

    def call(self, z):
        return self.dense(z)


def test_generators_need_not_be_copied():
    unregistered = Unregistered(3)
    unregistered(X)
    for generator in (dense_net(3, keras.layers.Lambda(lambda z: 2.0 * z)), unregistered):
        egm = compiled(make_egm(generator=generator, average_decay=0.5), lambda: SGD(0.5), run_eagerly=True)
        egm.fit(X, batch_size=4, epochs=2, verbose=0)
        assert egm.sample(5, seed=0).shape == (5, 3)
        assert differ(egm.averages, generator.get_weights())


def test_layers_are_told_that_they_train():
    dde_recorder, recorder = Recorder(), Recorder()
    dde = make_dde(net=dense_net(1, dde_recorder))
    egm = make_egm(dde_real=dde, generator=dense_net(3, recorder), dde_steps=1)
    compiled(egm, lambda: SGD(0.1), run_eagerly=True)
    for each in (recorder, dde_recorder):
        each.is_training.clear()
    egm.train_on_batch(X)
    assert recorder.is_training == [True, True]  # the step of the generator, and the points of the fake DDE
    assert dde_recorder.is_training == [False, True]  # the generator's step meets the density as it is, its own not
    egm.evaluate(X, verbose=0)
    assert not any(recorder.is_training[2:]) and not any(dde_recorder.is_training[2:])
    egm.sample(3)
    assert not recorder.is_training[-1]


def test_many_points_are_evaluated_part_by_part(monkeypatch):
    recorder = Recorder()
    dde = make_dde(net=dense_net(1, recorder))
    methods = (dde.log_density, dde.score, dde.denoise, dde)
    whole = [tf.nest.flatten(method(X)) for method in methods]
    monkeypatch.setattr(sampling, "chunk_size", lambda _: 3)
    recorder.num_points.clear()
    for method, expected in zip(methods, whole, strict=True):
        for given, reference in zip(tf.nest.flatten(method(X)), expected, strict=True):
            np.testing.assert_allclose(given, reference, rtol=1e-5, atol=1e-6)
    assert recorder.num_points == [3, 3, 2] * 4
    monkeypatch.undo()
    assert sampling.chunk_size((2,)) == 2**14
    assert sampling.chunk_size((28, 28, 1)) == 2**20 // 784


# ---------------------------------------------------------------------------------------------- other processes

PROGRAM = """
import importlib
import numpy as np
import energy_models
from energy_models import DDE, EGM, build_energy_net, build_generator

old = [DDE(build_energy_net(widths=(3,)), 0.3, seed=seed) for seed in (0, 1)]
importlib.reload(energy_models)
try:
    energy_models.EGM(*old, build_generator(widths=(3,)))
except ValueError as error:
    print(error)

import tensorflow as tf
x, losses = np.random.default_rng(0).standard_normal((64, 2)), []
for is_debugged in (False, True):
    if is_debugged:
        tf.data.experimental.enable_debug_mode()
    for batches in (x, tf.data.Dataset.from_tensor_slices(x).batch(32)):
        dde = DDE(build_energy_net(widths=(3,)), 0.3, seed=0)
        dde.compile()
        losses.append(dde.fit(batches, verbose=0).history["loss"][0])
print(losses[:2] == losses[2:])
"""


def run(program, **environment):
    root, environment = Path(__file__).parent.parent, {**os.environ, **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


def test_reloaded_classes_are_named_and_debugged_data_train():
    lines = run(PROGRAM, KERAS_BACKEND="tensorflow").stdout.splitlines()
    assert lines[0] == "energy_models was reloaded, and dde_real holds a DDE of before: restart the kernel"
    assert lines[1] == "True"


def test_other_backends_of_keras_are_refused_on_import():
    for program in ("import energy_models", "import egm_dde.runtime as r; r.prepare_process()"):
        process = run(program, KERAS_BACKEND="jax")
        assert process.stderr.splitlines()[-1].startswith("ImportError: this needs KERAS_BACKEND=tensorflow")
