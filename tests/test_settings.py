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
from small_models import assert_equal_arrays, differ, normal, record_calls

from egm_dde import sampling
from energy_models import DDE, EGM

X = normal(8, 2)


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


def network(num_outputs, *layers, seed=0, **options):
    dense = [
        keras.layers.Dense(5, "tanh", kernel_initializer=keras.initializers.GlorotUniform(seed + 1), **options),
        keras.layers.Dense(num_outputs, kernel_initializer=keras.initializers.GlorotUniform(seed + 2), use_bias=False),
    ]
    return keras.Sequential([keras.Input((2,)), *layers, *dense])


def make_dde(*layers, seed=0, **options):
    return DDE(network(1, *layers, seed=seed, **options), 0.3, seed=seed)


def make_egm(real=None, fake=None, generator=None, **options):
    parts = real or make_dde(seed=1), fake or make_dde(seed=2), generator or network(2, seed=3)
    return EGM(*parts, **{"dde_steps": 1, "seed": 0} | options)


def compile_with(model, optimizer, **options):
    """Compile with one optimizer for each network, made by a callable."""
    model.compile(*(optimizer() for _ in range(3 if isinstance(model, EGM) else 1)), **options)
    return model


# ---------------------------------------------------------------------------------------------- losses of layers


def model_with(place, *layers, **options):
    if place == "dde":
        return make_dde(*layers, **options)
    if place == "generator":
        return make_egm(generator=network(2, *layers, seed=3, **options))
    seed = {"real": 1, "fake": 2}[place]
    return make_egm(**{place: make_dde(*layers, seed=seed, **options)})


PLACES = {"dde": "net", "real": "dde_real", "fake": "dde_fake", "generator": "generator"}


@pytest.mark.parametrize("place", PLACES)
def test_losses_of_layers_are_descended_and_not_reported(place):
    # A step of size 0.1 moves a weight with the penalty 2 w^2 by -0.4 w more than without, one with 3 w by -0.3.
    weights, logs = [], []
    for options in ({}, {"kernel_regularizer": keras.regularizers.L2(2.0)}):
        model = compile_with(model_with(place, AddedLoss(), **options), lambda: SGD(0.1), run_eagerly=True)
        net = model.networks[PLACES[place]]
        before = net.layers[1].get_weights()[0]
        logs.append(model.train_on_batch(X, return_dict=True))
        weights.append([net.layers[0].get_weights()[0], net.layers[1].get_weights()[0]])
    np.testing.assert_allclose(weights[0][0], 0.7, rtol=1e-6)
    np.testing.assert_allclose(weights[1][1] - weights[0][1], -0.4 * before, rtol=1e-3, atol=1e-6)
    if place != "generator":  # the fake DDE learns what the generator makes after its step
        assert logs[0] == logs[1]


def test_activity_regularizers_are_descended():
    norms = []
    for regularizer in (None, keras.regularizers.L2(100.0)):
        dde = compile_with(make_dde(activity_regularizer=regularizer), lambda: Adam(1e-2))
        dde.fit(X, epochs=30, verbose=0)
        norms.append(np.linalg.norm(dde.net.layers[0].get_weights()[0]))
    assert norms[1] < 0.8 * norms[0]


# ---------------------------------------------------------------------------------------------- optimizers


def moves(make_model, optimizer, **options):
    """How the weights of all networks move in six steps."""
    model = compile_with(make_model(), optimizer)
    before = [net.get_weights() for net in model.networks.values()]
    model.fit(X, batch_size=4, epochs=3, verbose=0, **options)
    after = (net.get_weights() for net in model.networks.values())
    return [new - old for pair in zip(before, after, strict=True) for old, new in zip(*pair, strict=True)]


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_scaled_losses_give_the_same_steps(make_model):
    expected = moves(make_model, lambda: SGD(0.1))
    assert all(np.abs(move).max() > 1e-3 for move in expected)
    for scaled in (lambda: SGD(0.1, loss_scale_factor=1024), lambda: LossScaleOptimizer(SGD(0.1))):
        for move, reference in zip(moves(make_model, scaled), expected, strict=True):
            np.testing.assert_allclose(move, reference, rtol=1e-4, atol=1e-6)


def test_a_loss_scale_that_grew_too_large_is_lowered_and_is_no_error():
    optimizer = LossScaleOptimizer(SGD(0.1), initial_scale=1e38)
    dde = compile_with(make_dde(), lambda: optimizer)
    before = dde.net.get_weights()
    dde.fit(1e3 * X, epochs=1, verbose=0)
    assert_equal_arrays(before, dde.net.get_weights())
    assert float(optimizer.dynamic_scale) < 1e38


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_accumulated_gradients_are_those_of_as_many_batches(make_model, monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    model, reference = make_model(), make_model()
    compile_with(model, lambda: SGD(0.1, gradient_accumulation_steps=2), run_eagerly=True)
    weights = [[net.get_weights() for net in model.networks.values()]]
    for _ in range(4):
        model.train_on_batch(X)
        weights.append([net.get_weights() for net in model.networks.values()])
    for index in range(len(model.networks)):
        changes = [differ(one[index], other[index]) for one, other in itertools.pairwise(weights)]
        assert changes == [False, True, False, True]
    dde, reference = (getattr(each, "dde_real", each) for each in (model, reference))
    keys = [tuple(call["key"]) for call in calls if call["self"] is dde]
    assert len(set(keys)) == 4 == model.num_steps  # fresh noise in each
    with tf.GradientTape() as tape:
        loss = sum(reference.denoising_loss(tf.constant(X), tf.constant(key)) for key in keys[:2]) / 2
    gradients = tape.gradient(loss, reference.net.trainable_variables)
    for old, new, gradient in zip(weights[0][0], weights[2][0], gradients, strict=True):
        np.testing.assert_allclose(new - old, -0.1 * gradient, rtol=1e-3, atol=1e-6)


def test_accumulation_shows_each_point_as_often_as_planned(monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    dde = compile_with(make_dde(), lambda: Adam(1e-2, gradient_accumulation_steps=4), run_eagerly=True)
    dde.fit(X, batch_size=2, epochs=3, steps_per_epoch=2, verbose=0)  # a pass and a half
    seen = np.concatenate([call["x"] for call in calls])
    assert sorted(map(tuple, seen[:8])) == sorted(map(tuple, X))
    assert len({tuple(point) for point in seen[8:]}) == 4


def test_a_dde_may_end_with_the_moving_average_of_its_optimizer():
    dde = compile_with(make_dde(), lambda: Adam(1e-2, use_ema=True, ema_momentum=0.5))
    plain = compile_with(make_dde(), lambda: Adam(1e-2))
    for model in (dde, plain):
        model.fit(X, epochs=3, verbose=0)
    averages = dde.optimizer._model_variables_moving_average
    assert_equal_arrays(dde.net.get_weights(), averages)
    assert differ(dde.net.get_weights(), plain.net.get_weights())


@pytest.mark.parametrize("place", ["dde_optimizer", "gen_optimizer", "real_optimizer"])
def test_moving_averages_of_optimizers_are_refused_by_an_egm(place):
    for optimizer in (Adam(use_ema=True), LossScaleOptimizer(Adam(use_ema=True))):
        with pytest.raises(ValueError, match=f"{place} must not have use_ema=True.*by average_decay"):
            make_egm().compile(**{place: optimizer})


def test_one_optimizer_for_a_whole_egm_is_refused():
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


def test_compiling_again_goes_on_with_fresh_noise_and_another_order(monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    dde = make_dde()
    for _ in range(2):
        compile_with(dde, lambda: SGD(0.1), run_eagerly=True).fit(X, batch_size=4, verbose=0)
    assert len({tuple(call["key"]) for call in calls}) == 4 == dde.num_steps
    assert not np.array_equal(calls[0]["x"], calls[2]["x"])


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
    egm = compile_with(make_egm(), lambda: SGD(0.1))
    before = egm.get_weights()
    for callbacks in (callback, [callback], keras.callbacks.CallbackList([callback])):
        with pytest.raises(ValueError, match=message):
            egm.fit(X, verbose=0, callbacks=callbacks)
    assert_equal_arrays(before, egm.get_weights())
    rates = [LearningRateScheduler(lambda epoch: 0.0), EarlyStopping("loss", mode="min")]
    dde = compile_with(make_dde(), lambda: SGD(0.1))
    before = dde.net.get_weights()
    dde.fit(X, verbose=0, callbacks=rates)
    assert_equal_arrays(before, dde.net.get_weights())


def test_an_egm_stops_early_and_keeps_its_best(tmp_path):
    egm = compile_with(make_egm(), lambda: SGD(0.1))
    callbacks = [
        EarlyStopping("loss_dde_real", mode="min", min_delta=1e3),
        ModelCheckpoint(tmp_path / "{epoch}.keras"),
    ]
    assert egm.fit(X, verbose=0, epochs=5, callbacks=callbacks).epoch == [0, 1]
    assert (tmp_path / "2.keras").exists()


# ---------------------------------------------------------------------------------------------- networks


class Unregistered(keras.Model):
    """A generator that Keras cannot copy: it does not know how to make another one."""

    def __init__(self, width):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(width), keras.layers.Dense(2)

    def call(self, z):
        return self.out(self.hidden(z))


def test_generators_need_not_be_copied():
    unregistered = Unregistered(3)
    unregistered(X)
    for generator in (network(2, keras.layers.Lambda(lambda z: 2.0 * z)), unregistered):
        egm = compile_with(make_egm(generator=generator, average_decay=0.5), lambda: SGD(0.5))
        egm.fit(X, batch_size=4, epochs=2, verbose=0)
        assert egm.sample(5, seed=0).shape == (5, 2)
        assert differ(egm.averages, generator.get_weights())


def test_layers_are_told_that_they_train():
    dde_recorder, recorder = Recorder(), Recorder()
    egm = make_egm(real=make_dde(dde_recorder), generator=network(2, recorder))
    compile_with(egm, lambda: SGD(0.1), run_eagerly=True)
    for each in (recorder, dde_recorder):
        each.is_training.clear()
    egm.train_on_batch(X)
    assert recorder.is_training == [True, True]  # the step of the generator, and the points of the fake DDE
    assert dde_recorder.is_training == [False, True]  # the generator's step meets the density as it is, its own not
    egm.evaluate(X, verbose=0)
    assert not any(recorder.is_training[2:]) and not any(dde_recorder.is_training[2:])
    egm.sample(3)
    assert not recorder.is_training[-1]


def test_an_egm_is_measured_as_its_generator_is(monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    egm = compile_with(make_egm(), lambda: SGD(0.1), run_eagerly=True)
    for average in egm.averages:
        average.assign(tf.zeros_like(average))
    egm.evaluate(X, verbose=0)
    z, _ = egm.draw_latents(len(X), "evaluate", 0)
    np.testing.assert_allclose(calls[-1]["x"], egm.generator(z), rtol=1e-5)


def test_many_points_are_evaluated_part_by_part(monkeypatch):
    recorder = Recorder()
    dde, levels = make_dde(recorder), 0.3
    methods = (dde.log_density, dde.score, dde.denoise, dde)
    whole = [method(X, noise_std=levels) for method in methods]
    monkeypatch.setattr(sampling, "chunk_size", lambda _: 3)
    recorder.num_points.clear()
    for method, expected in zip(methods, whole, strict=True):
        for given, reference in zip(*map(tf.nest.flatten, (method(X, noise_std=levels), expected)), strict=True):
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
    return subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


def test_reloaded_classes_are_named_and_debugged_data_train():
    lines = run(PROGRAM).stdout.splitlines()
    assert lines[0] == "energy_models was reloaded, and dde_real holds a DDE of before: restart the kernel"
    assert lines[1] == "True"


@pytest.mark.parametrize("program", ["import energy_models", "import egm_dde.runtime as r; r.prepare_process()"])
def test_other_backends_of_keras_are_refused_on_import(program):
    process = run(program, KERAS_BACKEND="jax")
    assert process.stderr.splitlines()[-1].startswith("ImportError: this needs KERAS_BACKEND=tensorflow")
    assert run(program, KERAS_BACKEND="tensorflow").returncode == 0
