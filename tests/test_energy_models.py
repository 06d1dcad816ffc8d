import itertools
import math
import random
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD, Adam, RMSprop
from keras.optimizers.schedules import CosineDecay
from scipy import stats
from small_models import (
    DDE_KINDS,
    KEY,
    NOISE,
    assert_equal_arrays,
    central_differences,
    ddes_of,
    differ,
    double_precision,
    egm_parts,
    image_net,
    make_dde,
    make_egm,
    normal,
    points_for,
    record_calls,
    relative_error,
    zero_net,
)

from egm_dde import targets
from energy_models import DDE, EGM, build_energy_net, build_generator


def level_differences(dde, x, log_noise_std, step=1e-5):
    """Derivative (batch, 1) of the log density along log(noise_std), by central differences."""
    above, below = (dde.net([x, log_noise_std + shift]) for shift in (step, -step))
    return np.asarray(above - below) / (2 * step)


# --- The loss of a DDE ---


@pytest.mark.parametrize(
    ("kind", "dual_weight", "sources_per_block"),
    [*itertools.product(DDE_KINDS, [0.7], [3, 4, 512]), ("range", 0.0, 512)],
)
@double_precision()
def test_loss_equals_its_formula(kind, dual_weight, sources_per_block, monkeypatch):
    # Each of 8 points meets its own noise and, in the term that involves the network, the mean of all that it may have
    # had: by Bayes' rule over the points of its block.
    monkeypatch.setattr(targets, "SOURCES_PER_BLOCK", sources_per_block)
    dde = make_dde(kind, dual_weight=dual_weight)
    x = tf.constant(5 + points_for(dde, 8), tf.float64)
    noisy_x, noise, noise_std = (tensor.numpy() for tensor in dde.add_noise(x, KEY))
    score = central_differences(lambda y: dde.log_density(y, noise_std=np.resize(noise_std, len(y))), noisy_x)
    level_derivative = level_differences(dde, noisy_x, np.log(noise_std))[:, 0] if dde.noise_conditional else None
    dim = noise[0].size
    noise, score, noise_std = noise.reshape(8, dim), score.reshape(8, dim), noise_std[:, 0]
    expected = 0
    for i in range(8):
        block = range(i - i % sources_per_block, min(8, i - i % sources_per_block + sources_per_block))
        candidates = [(noisy_x[i] - x[j].numpy()).ravel() / noise_std[i] for j in block]
        probabilities = np.array([stats.norm.pdf(candidate).prod() for candidate in candidates])
        probabilities /= probabilities.sum()
        mean_noise = np.einsum("j,jd->d", probabilities, candidates)
        mean_target = np.einsum("j,jd->", probabilities, np.square(candidates)) - dim
        estimate, target = noise_std[i] * score[i], np.sum(noise[i] ** 2) - dim
        expected += np.sum(estimate**2 + 2 * estimate * mean_noise + noise[i] ** 2) / dim / 8
        if dde.noise_conditional:
            square = level_derivative[i] ** 2 - 2 * level_derivative[i] * mean_target + target**2
            expected += dual_weight * square / (2 * dim) / 8
    np.testing.assert_allclose(dde.denoising_loss(x, KEY), expected, rtol=1e-7)


@pytest.mark.parametrize("kind", DDE_KINDS)
@double_precision()
def test_gradient_of_the_loss_equals_finite_differences(kind):
    # A branch cut off from the gradient, the score's or the level derivative's, would show here.
    dde = make_dde(kind, dual_weight=0.7)
    x = tf.constant(points_for(dde, 8), tf.float64)
    with tf.GradientTape() as tape:
        loss = dde.denoising_loss(x, KEY)
    gradients = tape.gradient(loss, dde.trainable_variables)
    assert len(gradients) == len(dde.net.trainable_variables) > 0
    rng = np.random.default_rng(0)
    for variable, gradient in zip(dde.trainable_variables, gradients, strict=True):
        value, direction = variable.numpy(), rng.standard_normal(variable.shape)
        losses = []
        for step in (1e-5, -1e-5):
            variable.assign(value + step * direction)
            losses.append(float(dde.denoising_loss(x, KEY)))
        variable.assign(value)
        expected = (losses[0] - losses[1]) / 2e-5
        assert abs(expected) > 1e-4, variable.path
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-5, err_msg=variable.path)


class ExactGaussian(keras.layers.Layer):
    """The log density of N(mean, (std^2 + noise_std^2) I), times ``scale``, plus ``slope`` * log(noise_std)."""

    def __init__(self, mean, std):
        super().__init__()
        self.values = {"mean": mean, "std": std, "scale": 1.0, "slope": 0.0}

    def build(self, *_):
        for name, value in self.values.items():
            initializer = keras.initializers.Constant(value)
            setattr(self, name, self.add_weight(shape=np.shape(value), initializer=initializer, name=name))

    def call(self, x, log_noise_std):
        variance = tf.square(self.std) + tf.exp(2 * log_noise_std)
        squared_norm = tf.reduce_sum(tf.square(x - self.mean), axis=1, keepdims=True)
        log_density = -squared_norm / (2 * variance) - 0.5 * x.shape[1] * tf.math.log(2 * math.pi * variance)
        return self.scale * log_density + self.slope * log_noise_std


def exact_gaussian_dde(mean, std, noise_std):
    layer, x, log_noise_std = ExactGaussian(mean, std), keras.Input((len(mean),)), keras.Input((1,))
    if isinstance(noise_std, tuple):
        net = keras.Model([x, log_noise_std], layer(x, log_noise_std))
    else:
        net = keras.Model(x, layer(x, keras.ops.zeros_like(x[:, :1]) + math.log(noise_std)))
    return DDE(net, noise_std, dual_weight=1.0, seed=0), layer


@pytest.mark.parametrize("noise_std", [0.8, 0.3, (0.2, 1.6)])
def test_loss_of_the_exact_log_density_is_the_closed_form_minimum(noise_std):
    mean, std = [0.3, -0.6, 0.5], 0.6
    dde, layer = exact_gaussian_dde(mean, std, noise_std)
    x = tf.constant(mean + normal(200_000, 3, scale=std), tf.float32)
    # With r = s^2 / (std^2 + s^2): the score leaves 1 - r, the level derivative r (||y - mean||^2 / variance - d)
    # leaves 1 - r^2. Over a range, both are averaged over log(s): the integrals below have elementary antiderivatives.
    if isinstance(noise_std, tuple):
        variances = std**2 + np.square(noise_std)
        width = np.log(noise_std[1] / noise_std[0])
        mean_r = 0.5 * np.diff(np.log(variances))[0] / width
        mean_squared_r = 0.5 * np.diff(np.log(variances) + std**2 / variances)[0] / width
        minimum = (1 - mean_r) + (1 - mean_squared_r)
        perturbations = [("slope", 0.2), ("slope", -0.2)]
    else:
        minimum = 1 - noise_std**2 / (std**2 + noise_std**2)
        perturbations = []
    loss = tf.function(lambda: dde.denoising_loss(x, KEY))
    lowest = float(loss())
    np.testing.assert_allclose(lowest, minimum, rtol=0.01)
    perturbations += [("std", 0.1), ("std", -0.1), ("scale", 0.1), ("scale", -0.1)]
    perturbations += [("mean", 0.2 * sign * axis) for sign in (1, -1) for axis in np.eye(3)]
    for name, shift in perturbations:
        weight = getattr(layer, name)
        value = weight.numpy()
        weight.assign(value + shift)
        assert float(loss()) > lowest + 1e-3, (name, shift)
        weight.assign(value)


@pytest.mark.parametrize("noise_std", [0.05, 0.5, 2.0, (0.05, 2.0)])
def test_losses_are_comparable_across_noise_levels(noise_std):
    # Networks that have learned nothing: 1 at any level, and 1 more for the derivative along the level.
    egm = EGM(*egm_parts(noise_stds=(noise_std, noise_std)), seed=0)
    egm.compile(run_eagerly=True)
    logs = egm.evaluate(normal(50_000, 2), batch_size=50_000, verbose=0, return_dict=True)
    loss = 2 if isinstance(noise_std, tuple) else 1
    logs = {name: float(value) for name, value in logs.items()}  # tensors in Keras 3.8
    assert logs == pytest.approx({"loss_dde_real": loss, "loss_dde_fake": loss, "gen_loss": 0}, abs=0.03)


# --- Learning Gaussians, where everything is known ---


def fit_gaussian(noise_std, data_std, num_steps):
    """Train a DDE on N(0, data_std^2 I) in two dimensions."""
    conditional = isinstance(noise_std, tuple)
    net = build_energy_net(2, conditional, (32, 32), "tanh", num_features=4, feature_scale=0.5, data_std=2.0, seed=1)
    dde = DDE(net, noise_std, dual_weight=1.0, seed=2)
    x = normal(16_384, 2, scale=data_std)
    dde.compile(Adam(CosineDecay(1e-2, num_steps)))
    dde.fit(x, batch_size=256, epochs=num_steps // 64, shuffle=False, verbose=0)
    return dde


def bulk_points(variance):
    """Points within two standard deviations of N(0, variance I)."""
    points = normal(4000, 2, seed=8)
    return np.sqrt(variance) * points[np.linalg.norm(points, axis=1) < 2]


def exact_log_density(x, variance):
    return stats.multivariate_normal(cov=variance * np.eye(2)).logpdf(x)


def test_dde_learns_a_gaussian():
    data_std, noise_std = 0.7, 0.5
    dde = fit_gaussian(noise_std, data_std, num_steps=1280)
    variance = data_std**2 + noise_std**2
    x = bulk_points(variance)
    assert relative_error(dde.score(x), -x / variance) < 0.05
    assert relative_error(dde.denoise(x), data_std**2 / variance * x) < 0.03
    assert np.std(dde.log_density(x).numpy()[:, 0] - exact_log_density(x, variance)) < 0.03  # the constant is free
    loss = dde.evaluate(normal(100_000, 2, seed=9, scale=data_std), batch_size=20_000, verbose=0)
    np.testing.assert_allclose(loss, 1 - noise_std**2 / variance, rtol=0.02)


def test_dde_learns_a_gaussian_at_all_levels_with_one_constant():
    data_std, levels = 0.7, [0.3, 0.4, 0.8, 1.4, 1.5]
    dde = fit_gaussian((levels[0], levels[-1]), data_std, num_steps=1920)
    for level in levels[1:-1]:
        variance = data_std**2 + level**2
        x = bulk_points(variance)
        assert relative_error(dde.score(x, noise_std=level), -x / variance) < 0.05
    x = bulk_points(data_std**2)
    estimates = [dde.log_density(x, noise_std=level).numpy()[:, 0] for level in levels]
    exact = [exact_log_density(x, data_std**2 + level**2) for level in levels]
    assert np.abs(exact[0] - exact[-1]).max() > 1  # a constant per level would miss by this much
    for one, other in itertools.combinations(range(len(levels)), 2):
        np.testing.assert_allclose(estimates[one] - estimates[other], exact[one] - exact[other], atol=0.15)


@pytest.mark.parametrize("noise_std", [0.5, (0.3, 1.5)])
def test_egm_recovers_a_correlated_gaussian(noise_std):
    mean, covariance = np.array([1.0, -0.5]), np.array([[0.6, 0.4], [0.4, 0.5]])
    x = mean + normal(16_384, 2) @ np.linalg.cholesky(covariance).T
    nets = [
        build_energy_net(2, isinstance(noise_std, tuple), (32, 32), "tanh", 8, 1.0, data_std=2.0, seed=seed)
        for seed in (1, 2)
    ]
    generator = build_generator(2, 2, (32,), "relu", num_features=4, feature_scale=0.5, data_std=2.0, seed=3)
    options = {"dde_steps": 2, "latents_per_point": 1, "average_decay": 0.99, "seed": 6}
    egm = EGM(DDE(nets[0], noise_std, seed=4), DDE(nets[1], noise_std, seed=5), generator, **options)
    epochs, steps = 10, 64
    egm.compile(
        Adam(CosineDecay(1e-2, epochs * steps * egm.dde_steps), beta_1=0.5),
        Adam(CosineDecay(5e-3, epochs * steps), beta_1=0.5),
    )
    egm.fit(x, batch_size=len(x) // steps, epochs=epochs, shuffle=False, verbose=0)
    samples = egm.sample(50_000, seed=0)
    np.testing.assert_allclose(samples.mean(axis=0), mean, atol=0.1)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.1)


def test_level_power_weighs_the_levels_of_the_divergence():
    egm = make_egm("range", level_power=1.5)
    z, key = egm.draw_latents(64, "evaluate", 0)
    y, _, levels = egm.dde_fake.add_noise(egm.generate(z), key)
    log_q, log_p = (np.ravel(dde.log_density(y, levels)) for dde in (egm.dde_fake, egm.dde_real))
    expected = np.average(log_q - log_p, weights=np.ravel(levels) ** 1.5)
    assert abs(expected - np.mean(log_q - log_p)) > 1e-3
    np.testing.assert_allclose(egm.generator_loss(z, key), expected, rtol=1e-4)


# --- The steps of an EGM ---


def record_losses(monkeypatch):
    """Keep the calls of the three losses; returns a function that gives those of an EGM's DDEs and its generator."""
    dde_calls = record_calls(monkeypatch, DDE, "denoising_loss")
    generator_calls = record_calls(monkeypatch, EGM, "generator_loss")

    def calls_of(egm):
        return (*([call for call in dde_calls if call["self"] is dde] for dde in ddes_of(egm)), generator_calls)

    return calls_of


@pytest.mark.parametrize("kind", ["fixed", "range"])
@pytest.mark.parametrize("frozen", ["generator", "DDEs"])
def test_steps_leave_the_other_networks_alone(kind, frozen):
    egm = make_egm(kind)
    egm.compile(SGD(0.0 if frozen == "DDEs" else 0.01), SGD(0.0 if frozen == "generator" else 0.01), run_eagerly=True)
    parts = {**{name: net.weights for name, net in egm.networks.items()}, "averages": egm.averages}
    before = {name: [weight.numpy() for weight in weights] for name, weights in parts.items()}
    egm.fit(normal(10, 3), batch_size=5, verbose=0)
    changed = {name for name, weights in parts.items() if differ(before[name], weights)}
    assert changed == ({"generator", "averages"} if frozen == "DDEs" else {"dde_real", "dde_fake"})


@pytest.mark.parametrize("kind", ["fixed", "range"])
def test_generator_step_descends_the_kl_divergence(kind, monkeypatch):
    calls_of = record_losses(monkeypatch)
    egm, untouched = make_egm(kind), make_egm(kind)
    egm.compile(SGD(0.1), SGD(1.0), run_eagerly=True)
    egm.train_on_batch(normal(7, 3))
    _, _, calls = calls_of(egm)
    assert len(calls) == 1
    z, key = (tf.constant(calls[0][name]) for name in ("z", "key"))

    # The chain rule, written out: the mean over the batch of J_g(z)^T (score_fake(y) - score_real(y)).
    weights = untouched.generator.trainable_variables
    with tf.GradientTape() as tape:
        points = untouched.generator(z)
    jacobians = tape.jacobian(points, weights)  # each (batch, 3, *weight)
    noisy_y, _, noise_std = untouched.dde_fake.add_noise(points, key)
    scores = {name: getattr(untouched, name).score(noisy_y, noise_std=noise_std) for name in ("dde_fake", "dde_real")}
    difference = (scores["dde_fake"] - scores["dde_real"]).numpy()
    for before, after, jacobian in zip(weights, egm.generator.trainable_variables, jacobians, strict=True):
        gradient = np.tensordot(difference, jacobian, axes=2) / len(z)
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_allclose(before.numpy() - after.numpy(), gradient, rtol=1e-3, atol=1e-6)

    log_densities = [getattr(untouched, name).log_density(noisy_y, noise_std=noise_std) for name in scores]
    np.testing.assert_allclose(calls[0]["result"], np.mean(log_densities[0] - log_densities[1]), rtol=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "range"])
def test_dde_steps_descend_the_loss_of_each_dde(kind, monkeypatch):
    calls_of = record_losses(monkeypatch)
    egm, untouched = make_egm(kind, dde_steps=1), make_egm(kind, dde_steps=1)
    egm.compile(SGD(0.1), SGD(1.0), run_eagerly=True)
    x = normal(7, 3)
    egm.train_on_batch(x)
    calls = calls_of(egm)
    np.testing.assert_array_equal(calls[0][0]["x"], x)
    # The points come from the generator after its step, not from the moving average of it.
    z, _ = egm.draw_latents(7, "latents", 0)
    np.testing.assert_allclose(calls[1][0]["x"], egm.generator(z), rtol=1e-5, atol=1e-6)
    assert not np.allclose(calls[1][0]["x"], egm(z), rtol=1e-2)
    for dde, stepped, (call,) in zip(ddes_of(untouched), ddes_of(egm), calls[:2], strict=True):
        with tf.GradientTape() as tape:
            loss = dde.denoising_loss(tf.constant(call["x"]), tf.constant(call["key"]))
        gradients = tape.gradient(loss, dde.trainable_variables)
        for before, after, gradient in zip(
            dde.trainable_variables, stepped.trainable_variables, gradients, strict=True
        ):
            np.testing.assert_allclose(before - after, 0.1 * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("dde_steps", "latents_per_point"), [(1, 2), (3, 1)])
def test_each_inner_step_has_fresh_latents_and_noise(dde_steps, latents_per_point, monkeypatch):
    calls_of = record_losses(monkeypatch)
    egm = make_egm(dde_steps=dde_steps, latents_per_point=latents_per_point)
    egm.compile(SGD(0.01), SGD(0.0), run_eagerly=True)  # the generator is fixed: other points are other latents
    x = normal(8, 3)
    egm.fit(x, batch_size=5, epochs=2, shuffle=False, verbose=0)
    sizes = [5, 3] * 2
    real_calls, fake_calls, generator_calls = calls_of(egm)
    assert [len(call["z"]) for call in generator_calls] == [size * latents_per_point for size in sizes]
    inner_sizes = np.repeat(sizes, dde_steps).tolist()
    assert [len(call["x"]) for call in real_calls] == [len(call["x"]) for call in fake_calls] == inner_sizes
    for i, call in enumerate(real_calls):
        batch = i // dde_steps % 2
        np.testing.assert_array_equal(call["x"], x[5 * batch : 5 * batch + 5])
    keys = {tuple(call["key"]) for call in real_calls + generator_calls}
    assert len(keys) == len(sizes) * (1 + dde_steps)
    # DDEs of one seed meet the same noise at the same levels.
    assert_equal_arrays([call["key"] for call in real_calls], [call["key"] for call in fake_calls])
    generated = [call["x"] for call in fake_calls] + [egm.generator(call["z"]).numpy() for call in generator_calls]
    generated = np.concatenate(generated)
    assert generated.shape == (sum(sizes) * (latents_per_point + dde_steps), 3)
    assert len(np.unique(generated, axis=0)) == len(generated)


def test_latents_and_noise_of_a_step_are_independent_standard_normals(monkeypatch):
    calls_of = record_losses(monkeypatch)
    dde_real, _, generator = egm_parts()
    egm = EGM(dde_real, DDE(zero_net(2), 0.1, seed=1), generator, dde_steps=1, latents_per_point=1, seed=0)
    egm.compile(SGD(0.0), run_eagerly=True)
    x = normal(5000, 2)
    egm.train_on_batch(x)
    (real_call,), (fake_call,), (generator_call,) = calls_of(egm)
    latents = [generator_call["z"], fake_call["x"]]
    noise = [egm.dde_real.add_noise(tf.constant(x), call["key"])[1] for call in (real_call, fake_call, generator_call)]
    for column in np.concatenate(latents + noise, axis=1).T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    for z in latents:  # two draws of latents are one sequence with two random shifts
        np.testing.assert_allclose(np.corrcoef(np.concatenate([z, *noise], axis=1).T), np.eye(8), atol=0.06)


def test_each_dde_training_step_has_fresh_noise(monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    dde = make_dde("fixed")
    dde.compile(SGD(0.01), run_eagerly=True)
    dde.fit(points_for(dde, 10), batch_size=4, epochs=2, verbose=0)
    dde.evaluate(points_for(dde, 10), batch_size=4, verbose=0)
    assert len({tuple(call["key"]) for call in calls}) == len(calls) == 3 * 3


def test_frozen_real_dde_stays_as_it_is_and_is_measured(monkeypatch):
    calls_of = record_losses(monkeypatch)
    egm = make_egm("range")
    egm.dde_real.trainable = False
    egm.compile(SGD(0.1), SGD(0.1), run_eagerly=True)
    parts = (egm.dde_real, egm.dde_fake, egm.generator)
    before = [part.get_weights() for part in parts]
    x = normal(10, 3)
    logs = egm.fit(x, batch_size=5, shuffle=False, verbose=0).history
    assert egm.num_steps == 2
    assert [differ(old, part.get_weights()) for old, part in zip(before, parts, strict=True)] == [False, True, True]
    real_calls, fake_calls, _ = calls_of(egm)
    assert (len(real_calls), len(fake_calls)) == (2, 4)  # measured once a step
    np.testing.assert_array_equal(np.concatenate([call["x"] for call in real_calls]), x)
    np.testing.assert_allclose(logs["loss_dde_real"], np.mean([call["result"] for call in real_calls]), rtol=1e-5)


# --- Optimizers ---


def optimizers_of(model):
    return [*(dde.optimizer for dde in ddes_of(model)), *([model.optimizer] if isinstance(model, EGM) else [])]


@pytest.mark.parametrize("dde_steps", [1, 3])
def test_each_network_has_an_optimizer_of_its_own(dde_steps):
    egm = make_egm(dde_steps=dde_steps)
    egm.compile(Adam(0.02, beta_1=0.3), Adam(0.03), run_eagerly=True)
    optimizers = optimizers_of(egm)
    assert len({id(optimizer) for optimizer in optimizers}) == 3
    assert [float(optimizer.learning_rate) for optimizer in optimizers] == pytest.approx([0.02, 0.02, 0.03])
    assert [optimizer.beta_1 for optimizer in optimizers] == [0.3, 0.3, 0.9]
    egm.fit(normal(10, 3), batch_size=5, epochs=2, verbose=0)
    assert [int(optimizer.iterations) for optimizer in optimizers] == [4 * dde_steps, 4 * dde_steps, 4]
    assert egm.num_steps == 4
    for optimizer, part in zip(optimizers, (egm.dde_real, egm.dde_fake, egm.generator), strict=True):
        assert len(optimizer.variables) == 2 + 2 * len(part.trainable_variables)  # two moments for each weight
        assert all(np.any(variable.numpy()) for variable in optimizer.variables)


def test_the_real_dde_may_take_other_steps_with_another_optimizer(tmp_path):
    real, fake, generator = egm_parts()
    egm = EGM(real, fake, generator, dde_steps=3, real_steps=2, seed=1)
    egm.compile(Adam(0.02), Adam(0.03), Adam(0.04), run_eagerly=True)
    egm.fit(normal(10, 2), batch_size=5, verbose=0)
    assert (egm.dde_real.num_steps, egm.dde_fake.num_steps, egm.num_steps) == (4, 6, 2)
    egm.save(tmp_path / "egm.keras")
    loaded = EGM.load(tmp_path / "egm.keras")
    for model in (egm, loaded):
        rates = [float(optimizer.learning_rate) for optimizer in optimizers_of(model)]
        assert rates == pytest.approx([0.04, 0.02, 0.03])
        assert (model.dde_steps, model.real_steps) == (3, 2)


@pytest.mark.parametrize("optimizer", [RMSprop(0.01), "rmsprop", None])
def test_one_optimizer_or_none_may_be_given_for_both(optimizer):
    dde, egm = make_dde("fixed"), make_egm()
    dde.compile(optimizer)
    egm.compile(optimizer, optimizer, run_eagerly=True)
    assert all(each.built for each in [dde.optimizer, *optimizers_of(egm)])
    egm.fit(normal(10, 3), batch_size=5, verbose=0)
    assert [int(each.iterations) for each in optimizers_of(egm)] == [4, 4, 2]


# --- Logs ---


class BatchLogs(keras.callbacks.Callback):
    """Keep what the progress bar shows after each batch."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(logs)


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_logs_are_means_over_the_points_of_an_epoch(make_model, monkeypatch):
    calls_of = record_losses(monkeypatch)
    model = make_model("range")
    model.compile(*[SGD(0.1)] * (2 if make_model is make_egm else 1), run_eagerly=True)
    x, batches = normal(10, 3), BatchLogs()
    options = {"validation_data": x, "validation_batch_size": 4, "callbacks": [batches], "verbose": 0}
    history = model.fit(x, batch_size=4, epochs=2, **options).history
    names = ["loss_dde_real", "loss_dde_fake", "gen_loss"] if make_model is make_egm else ["loss"]
    assert set(history) == {*names, *(f"val_{name}" for name in names)}
    for name, calls in zip(names, calls_of(model), strict=False):
        losses = np.reshape([call["result"] for call in calls], (2, -1))  # each epoch trains, then validates
        validation = losses[:, -3:]
        losses = losses[:, :-3].reshape(2, 3, -1).mean(axis=-1)  # (epochs, batches), the mean over the inner steps
        assert np.ptp(losses, axis=1).min() > 1e-3
        for logged, values in ((history[name], losses), (history[f"val_{name}"], validation)):
            np.testing.assert_allclose(logged, values @ [0.4, 0.4, 0.2], rtol=1e-4)  # batches of 4, 4 and 2
        so_far = (np.cumsum(losses * [4, 4, 2], axis=1) / [4, 8, 10]).ravel()
        np.testing.assert_allclose([logs[name] for logs in batches.logs], so_far, rtol=1e-4)


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_evaluation_repeats_itself(make_model):
    model = make_model("range")
    model.compile(*[SGD(0.0)] * (2 if make_model is make_egm else 1), run_eagerly=True)
    x, before = normal(10, 3), [weight.numpy() for weight in model.trainable_weights]
    first = model.evaluate(x, batch_size=4, verbose=0, return_dict=True)
    history = model.fit(x, validation_data=x, validation_batch_size=4, epochs=2, verbose=0).history
    assert model.evaluate(x, batch_size=4, verbose=0, return_dict=True) == first
    assert {name: history[f"val_{name}"] for name in first} == {name: [value] * 2 for name, value in first.items()}
    assert_equal_arrays(before, model.trainable_weights)


# --- Files ---


def load_without_warnings(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return keras.saving.load_model(path)


@pytest.mark.parametrize("kind", ["fixed", "EGM range"])
def test_a_loaded_model_is_the_saved_one(kind, tmp_path):
    # Optimizers unlike the default ones; ``steps_per_execution`` stands for the other options.
    if kind == "fixed":
        model = make_dde(kind, dual_weight=0.7)
        model.compile(Adam(CosineDecay(0.01, 50), beta_1=0.3), steps_per_execution=2)
    else:
        model = make_egm("range")
        model.compile(RMSprop(0.004, momentum=0.5), Adam(CosineDecay(0.01, 50), beta_1=0.3), steps_per_execution=2)
    x = normal(10, 3)
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(x, **options)
    model.save(tmp_path / "model.keras")
    loaded = load_without_warnings(tmp_path / "model.keras")

    assert type(loaded) is type(model)
    assert_equal_arrays(model.get_weights(), loaded.get_weights())
    if isinstance(model, EGM):
        np.testing.assert_array_equal(model.sample(5, seed=1), loaded.sample(5, seed=1))
        assert (loaded.seed, loaded.dde_steps, loaded.latents_per_point, loaded.average_decay) == (11, 2, 2, 0.15)
        assert differ(loaded.generator.get_weights(), loaded.averages)
    for saved_dde, loaded_dde in zip(ddes_of(model), ddes_of(loaded), strict=True):
        assert_equal_arrays(saved_dde(x), loaded_dde(x))
        assert loaded_dde.noise_std == NOISE[kind.removeprefix("EGM ")]
        assert (loaded_dde.noise_range, loaded_dde.dual_weight) == (saved_dde.noise_range, saved_dde.dual_weight)
        assert loaded_dde.seed == 7

    assert loaded.compiled
    assert loaded.steps_per_execution == 2
    assert loaded.jit_compile == model.jit_compile
    for saved_optimizer, loaded_optimizer in zip(optimizers_of(model), optimizers_of(loaded), strict=True):
        assert type(loaded_optimizer) is type(saved_optimizer)
        assert loaded_optimizer.get_config() == saved_optimizer.get_config()
        assert int(loaded_optimizer.iterations) == int(saved_optimizer.iterations) > 0
        values = [[variable.numpy() for variable in o.variables] for o in (saved_optimizer, loaded_optimizer)]
        assert_equal_arrays(*values)
        assert any(np.any(value) for value in values[1][2:])  # slots that were used, not new ones

    histories = [each.fit(x, **options).history for each in (model, loaded)]
    assert histories[0] == histories[1]
    assert_equal_arrays(model.get_weights(), loaded.get_weights())


@pytest.mark.parametrize("model_class", [DDE, EGM])
def test_a_model_that_was_never_compiled_is_saved_with_its_options(model_class, tmp_path):
    # Values that nobody would make a default.
    if model_class is DDE:
        options = {"dual_weight": 0.37, "seed": 12345}
        model = DDE(image_net(True), (0.21, 0.34), **options)
    else:
        options = {"dde_steps": 7, "latents_per_point": 9, "average_decay": 0.123, "level_power": 1.7, "seed": 12345}
        model = EGM(*egm_parts(), **options)
    model.save(tmp_path / "model.keras")
    loaded = load_without_warnings(tmp_path / "model.keras")
    assert not loaded.compiled
    assert {name: getattr(loaded, name) for name in options} == options
    assert [dde.noise_std for dde in ddes_of(loaded)] == [dde.noise_std for dde in ddes_of(model)]
    assert_equal_arrays(model.get_weights(), loaded.get_weights())


def test_an_egm_of_trained_ddes_is_saved_with_their_optimizers(tmp_path):
    egm = make_egm()
    for dde in ddes_of(egm):
        dde.compile(Adam(0.01), run_eagerly=True)
        dde.fit(normal(8, 3), batch_size=4, verbose=0)
    egm.save(tmp_path / "model.keras")
    loaded = load_without_warnings(tmp_path / "model.keras")
    for saved_dde, loaded_dde in zip(ddes_of(egm), ddes_of(loaded), strict=True):
        assert loaded_dde.compiled
        slots = [[variable.numpy() for variable in each.optimizer.variables] for each in (saved_dde, loaded_dde)]
        assert_equal_arrays(*slots)


@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_frozen_real_dde_is_frozen_after_loading(tmp_path):
    egm = make_egm("range")
    egm.dde_real.trainable = False
    egm.compile(run_eagerly=True)
    x, before = normal(16, 3), egm.dde_real.get_weights()
    egm.fit(x, batch_size=8, verbose=0)
    egm.save(tmp_path / "egm.keras")
    loaded = EGM.load(tmp_path / "egm.keras")
    slots = [[variable.numpy() for variable in model.dde_real.optimizer.variables] for model in (egm, loaded)]
    assert_equal_arrays(*slots)
    losses = [model.fit(x, batch_size=8, epochs=2, initial_epoch=1, verbose=0).history for model in (egm, loaded)]
    assert losses[0] == losses[1]
    assert_equal_arrays(egm.get_weights(), loaded.get_weights())
    assert_equal_arrays(loaded.dde_real.get_weights(), before)


# --- Reproducibility and input kinds ---


class Batches(keras.utils.PyDataset):
    def __init__(self, x, batch_size):
        super().__init__()
        self.x, self.batch_size = x, batch_size

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __getitem__(self, index):
        return (self.x[index * self.batch_size : (index + 1) * self.batch_size],)


@pytest.mark.parametrize("make_model", [make_dde, pytest.param(make_egm, marks=pytest.mark.slow)])
def test_training_is_a_function_of_the_seed_and_the_batches(make_model):
    # Ten points in batches of four: the last batch is smaller.
    x = normal(10, 3)
    inputs = {
        "array": (x, {"batch_size": 4}),
        "float64 array": (x.astype(np.float64), {"batch_size": 4}),
        "tensor": (tf.constant(x), {"batch_size": 4}),
        "Dataset": (tf.data.Dataset.from_tensor_slices(x).batch(4), {}),
        "PyDataset": (Batches(x, 4), {}),
        "other seed": (x, {"batch_size": 4}),
    }
    results = {}
    for name, (data, options) in inputs.items():
        model = make_model("range", seed=1 if name == "other seed" else 0)
        model.compile(run_eagerly=True)
        history = model.fit(data, epochs=2, shuffle=False, verbose=0, **options).history
        results[name] = [*history.values(), *model.get_weights()]
        if name == "Dataset":
            evaluations = [model.evaluate(each, verbose=0) for each in (data, Batches(x, 4))]
            assert evaluations[0] == evaluations[1]
    for name in results:
        if name == "other seed":
            assert differ(results["array"], results[name])
        else:
            assert_equal_arrays(results["array"], results[name])


@pytest.mark.parametrize(("make_model", "kind"), [(make_dde, "images and range"), (make_egm, "range")])
def test_eager_and_graph_training_agree(make_model, kind):
    histories = []
    for run_eagerly in (True, False):
        model = make_model(kind)
        model.compile(*[SGD(0.1)] * (2 if make_model is make_egm else 1), run_eagerly=run_eagerly)
        x = points_for(ddes_of(model)[0], 10)
        histories.append(model.fit(x, batch_size=4, epochs=2, shuffle=False, verbose=0).history)
    for name in histories[0]:
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-4)


def test_seed_none_draws_one_from_python():
    for make_model in (lambda: DDE(zero_net(2), 0.1), lambda: EGM(*egm_parts())):
        seeds = []
        for python_seed in (0, 0, 1):
            random.seed(python_seed)
            seeds.append(make_model().seed)
        assert seeds[0] == seeds[1] != seeds[2]
