import itertools
import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD, Adam
from keras.optimizers.schedules import CosineDecay
from scipy import stats
from small_models import (
    DDE_KINDS,
    KEY,
    assert_equal_arrays,
    central_differences,
    compiled,
    ddes_of,
    differ,
    double_precision,
    egm_parts,
    make_dde,
    make_egm,
    normal,
    points_for,
    record_calls,
    relative_error,
    trained_parts,
    values_of,
    zero_net,
)

from egm_dde import targets
from energy_models import DDE, EGM, build_energy_net, build_generator

# --- The loss of a DDE ---


@pytest.mark.parametrize(
    ("kind", "dual_weight", "sources_per_block"),
    [*itertools.product(DDE_KINDS, [0.7], [3, 4, 512]), ("range", 0.0, 512)],
)
@double_precision()
def test_loss_equals_its_formula(kind, dual_weight, sources_per_block, monkeypatch):
    # Each of 8 points meets its own noise and, in the term that involves the network, the mean of all that it may have
    # had: by Bayes' rule over the points of its block.
    monkeypatch.setattr(targets, "POINTS_PER_BLOCK", sources_per_block)
    dde = make_dde(kind, dual_weight=dual_weight)
    x = tf.constant(5 + points_for(dde, 8), tf.float64)
    noisy_x, noise, noise_std = (tensor.numpy() for tensor in dde.add_noise(x, KEY))
    score = central_differences(lambda y: dde.log_density(y, noise_std=np.resize(noise_std, len(y))), noisy_x)
    if dde.noise_conditional:
        level_slope = central_differences(lambda level: dde.net([noisy_x, level]), np.log(noise_std))[:, 0]
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
            square = level_slope[i] ** 2 - 2 * level_slope[i] * mean_target + target**2
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


# --- Learning Gaussians, where everything is known ---


def fit_gaussian(noise_std, data_std, num_steps):
    """Train a DDE on N(0, data_std^2 I) in two dimensions; return it with its loss on other points."""
    conditional = isinstance(noise_std, tuple)
    net = build_energy_net(2, conditional, (32, 32), "tanh", num_features=4, feature_scale=0.5, data_std=2.0, seed=1)
    dde = DDE(net, noise_std, dual_weight=1.0, seed=2)
    dde.compile(Adam(CosineDecay(1e-2, num_steps)))
    x, x_test = normal(16_384, 2, scale=data_std), normal(100_000, 2, seed=9, scale=data_std)
    dde.fit(x, batch_size=256, epochs=num_steps // 64, shuffle=False, verbose=0)
    return dde, dde.evaluate(x_test, batch_size=20_000, verbose=0)


def bulk_points(variance):
    """Points within two standard deviations of N(0, variance I)."""
    points = normal(4000, 2, seed=8)
    return np.sqrt(variance) * points[np.linalg.norm(points, axis=1) < 2]


def exact_log_density(x, variance):
    return stats.multivariate_normal(cov=variance * np.eye(2)).logpdf(x)


def test_dde_learns_a_gaussian():
    data_std, noise_std = 0.7, 0.5
    dde, loss = fit_gaussian(noise_std, data_std, num_steps=1280)
    variance = data_std**2 + noise_std**2
    x = bulk_points(variance)
    assert relative_error(dde.score(x), -x / variance) < 0.05
    assert relative_error(dde.denoise(x), data_std**2 / variance * x) < 0.03
    assert np.std(dde.log_density(x).numpy()[:, 0] - exact_log_density(x, variance)) < 0.03  # the constant is free
    np.testing.assert_allclose(loss, 1 - noise_std**2 / variance, rtol=0.02)


def test_dde_learns_a_gaussian_at_all_levels_with_one_constant():
    data_std, levels = 0.7, [0.3, 0.4, 0.8, 1.4, 1.5]
    dde, loss = fit_gaussian((levels[0], levels[-1]), data_std, num_steps=1920)
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
    # With r = noise_std^2 / variance, the score leaves 1 - r, and the level derivative 1 - r^2.
    grid = np.geomspace(levels[0], levels[-1], 1000)
    r = grid**2 / (data_std**2 + grid**2)
    np.testing.assert_allclose(loss, np.mean(2 - r - r**2), rtol=0.02)


@pytest.mark.parametrize("noise_std", [0.5, (0.3, 1.5)])
def test_egm_recovers_a_correlated_gaussian(noise_std):
    mean, covariance = np.array([1.0, -0.5]), np.array([[0.6, 0.4], [0.4, 0.5]])
    x = mean + normal(16_384, 2) @ np.linalg.cholesky(covariance).T
    in_range = isinstance(noise_std, tuple)
    nets = [build_energy_net(2, in_range, (32, 32), "tanh", 8, 1.0, data_std=2.0, seed=seed) for seed in (1, 2)]
    ddes = [DDE(net, noise_std, seed=seed) for seed, net in enumerate(nets)]
    generator = build_generator(2, 2, (32,), "relu", num_features=4, feature_scale=0.5, data_std=2.0, seed=3)
    egm = EGM(*ddes, generator, dde_steps=2, latents_per_point=1, average_decay=0.99, seed=6)
    epochs, steps = 10, 64
    egm.compile(
        Adam(CosineDecay(1e-2, epochs * steps * egm.dde_steps), beta_1=0.5),
        Adam(CosineDecay(5e-3, epochs * steps), beta_1=0.5),
    )
    egm.fit(x, batch_size=len(x) // steps, epochs=epochs, shuffle=False, verbose=0)
    samples = egm.sample(50_000, seed=0)
    np.testing.assert_allclose(samples.mean(axis=0), mean, atol=0.1)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.1)


# --- The steps of an EGM ---


def record_losses(monkeypatch):
    """Keep the calls of the three losses; returns a function that gives those of an EGM's DDEs and its generator."""
    dde_calls = record_calls(monkeypatch, DDE, "denoising_loss")
    generator_calls = record_calls(monkeypatch, EGM, "generator_loss")

    def calls_of(egm):
        return (*([call for call in dde_calls if call["self"] is dde] for dde in ddes_of(egm)), generator_calls)

    return calls_of


@pytest.mark.parametrize(("kind", "level_power"), [("fixed", 0), ("range", 0), ("range", 1.5)])
def test_each_network_descends_its_own_loss_and_no_other(kind, level_power, monkeypatch):
    calls_of = record_losses(monkeypatch)
    egm, untouched = (make_egm(kind, dde_steps=1, level_power=level_power) for _ in range(2))
    egm.compile(SGD(0.1), SGD(1.0), run_eagerly=True)
    x = normal(7, 3)
    egm.train_on_batch(x)
    (real_call,), (fake_call,), (gen_call,) = calls_of(egm)
    np.testing.assert_array_equal(real_call["x"], x)
    # The points come from the generator after its step, not from the moving average of it.
    z, _ = egm.draw_latents(7, "latents", 0)
    np.testing.assert_allclose(fake_call["x"], egm.generator(z), rtol=1e-5, atol=1e-6)
    assert not np.allclose(fake_call["x"], egm(z), rtol=1e-2)

    expected = []
    for dde, call in zip(ddes_of(untouched), (real_call, fake_call), strict=True):
        with tf.GradientTape() as tape:
            loss = dde.denoising_loss(tf.constant(call["x"]), tf.constant(call["key"]))
        expected.append([0.1 * gradient.numpy() for gradient in tape.gradient(loss, dde.net.trainable_variables)])
    # The chain rule, written out: the mean over the batch of J_g(z)^T (score_fake(y) - score_real(y)).
    with tf.GradientTape() as tape:
        points = untouched.generator(gen_call["z"])
    jacobians = tape.jacobian(points, untouched.generator.trainable_variables)  # each (batch, 3, *weight)
    noisy_y, _, noise_std = untouched.dde_fake.add_noise(points, gen_call["key"])
    shares = noise_std**level_power / tf.reduce_sum(noise_std**level_power)  # (batch, 1)
    (log_p, score_p), (log_q, score_q) = (dde(noisy_y, noise_std=noise_std) for dde in ddes_of(untouched))
    difference = shares * (score_q - score_p)
    expected.append([np.tensordot(difference, jacobian, axes=2) for jacobian in jacobians])
    np.testing.assert_allclose(gen_call["result"], np.sum(shares * (log_q - log_p)), rtol=1e-4)

    for before, after, moves in zip(untouched.networks.values(), egm.networks.values(), expected, strict=True):
        for old, new, move in zip(before.trainable_variables, after.trainable_variables, moves, strict=True):
            assert np.abs(move).max() > 1e-5
            np.testing.assert_allclose(old.numpy() - new.numpy(), move, rtol=1e-3, atol=1e-6)


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


def test_a_batch_can_hold_more_sources_than_it_moves(monkeypatch):
    ddes = [make_dde(sources_per_point=number) for number in (3, 2)]
    x = tf.constant(normal(8, 3))
    noisy_x, noise, noise_std = ddes[0].add_noise(x[:3], KEY)
    mean_noise, _, _ = targets.average_over_sources(x, noisy_x, noise, noise_std)
    expected = (noise_std * ddes[0].score(noisy_x) + mean_noise) ** 2 + noise**2 - mean_noise**2
    np.testing.assert_allclose(ddes[0].denoising_loss(x, KEY, training=True), np.mean(expected), rtol=1e-5)
    calls_of = record_losses(monkeypatch)
    egm = make_egm(dde_real=ddes[0], dde_fake=ddes[1], dde_steps=2)
    compiled(egm, lambda: SGD(0.0), run_eagerly=True)
    egm.fit(x, batch_size=8, shuffle=False, verbose=0)
    real_calls, fake_calls, generator_calls = calls_of(egm)
    assert_equal_arrays([call["x"] for call in real_calls], [x, np.roll(x, -3, axis=0)])  # other points are moved
    assert [len(call["x"]) for call in fake_calls] == [6, 6]
    assert [len(call["z"]) for call in generator_calls] == [3 * egm.latents_per_point]


def test_latents_and_noise_of_a_step_are_independent_standard_normals(monkeypatch):
    calls_of = record_losses(monkeypatch)
    dde_real, _, generator = egm_parts()
    egm = EGM(dde_real, DDE(zero_net(2), 0.1, seed=1), generator, dde_steps=1, latents_per_point=1, seed=0)
    compiled(egm, lambda: SGD(0.0), run_eagerly=True)
    x = normal(5000, 2)
    egm.train_on_batch(x)
    _, fake_call, generator_call = calls = [call for (call,) in calls_of(egm)]
    latents = [generator_call["z"], fake_call["x"]]
    noise = [egm.dde_real.add_noise(tf.constant(x), call["key"])[1] for call in calls]
    for column in np.concatenate(latents + noise, axis=1).T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    for z in latents:  # two draws of latents are one sequence with two random shifts
        np.testing.assert_allclose(np.corrcoef(np.concatenate([z, *noise], axis=1).T), np.eye(8), atol=0.06)


def test_each_step_of_a_dde_has_fresh_noise(monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    dde = make_dde()
    x = points_for(dde, 10)
    for _ in range(2):  # compiling again sets nothing back
        compiled(dde, lambda: SGD(0.01), run_eagerly=True).fit(x, batch_size=4, verbose=0)
    dde.evaluate(x, batch_size=4, verbose=0)
    assert dde.num_steps == 6
    assert len({tuple(call["key"]) for call in calls}) == len(calls) == 3 * 3
    assert differ([call["x"] for call in calls[:3]], [call["x"] for call in calls[3:6]])  # another order, too


def test_frozen_real_dde_stays_as_it_is_and_is_measured(monkeypatch):
    calls_of = record_losses(monkeypatch)
    egm = make_egm("range")
    egm.dde_real.trainable = False
    compiled(egm, lambda: Adam(0.1), run_eagerly=True)
    slots = [part.optimizer.variables for part in (egm.dde_real, egm.dde_fake)]
    assert len(slots[0]) == len(slots[1])  # so that files fit when it is thawed
    before = [net.get_weights() for net in egm.networks.values()]
    x = normal(10, 3)
    logs = egm.fit(x, batch_size=5, shuffle=False, verbose=0).history
    assert egm.num_steps == 2
    changed = [differ(old, net.get_weights()) for old, net in zip(before, egm.networks.values(), strict=True)]
    assert changed == [False, True, True]
    real_calls, fake_calls, _ = calls_of(egm)
    assert (len(real_calls), len(fake_calls)) == (2, 4)  # measured once a step
    np.testing.assert_array_equal(np.concatenate([call["x"] for call in real_calls]), x)
    np.testing.assert_allclose(logs["loss_dde_real"], np.mean([call["result"] for call in real_calls]), rtol=1e-5)


# --- Optimizers ---


@pytest.mark.parametrize(
    ("dde_steps", "real_steps", "optimizers", "rates", "betas"),
    [
        (3, None, [Adam(0.02, beta_1=0.3), Adam(0.03)], [0.02, 0.02, 0.03], [0.3, 0.3, 0.9]),
        (3, 2, [Adam(0.02, beta_1=0.3), Adam(0.03), Adam(0.04)], [0.04, 0.02, 0.03], [0.9, 0.3, 0.9]),
        (2, 2, [None, None], [5e-3, 5e-3, 3e-3], [0.5, 0.5, 0.5]),
        (1, None, [Adam(0.01)] * 2, [0.01, 0.01, 0.01], [0.9, 0.9, 0.9]),
        (1, 1, ["adam", "adam"], [1e-3, 1e-3, 1e-3], [0.9, 0.9, 0.9]),
    ],
)
def test_each_network_has_an_optimizer_of_its_own(dde_steps, real_steps, optimizers, rates, betas):
    egm = make_egm(dde_steps=dde_steps, real_steps=real_steps)
    egm.compile(*optimizers, run_eagerly=True)
    assert all(part.optimizer.built for part in trained_parts(egm))
    egm.fit(normal(10, 3), batch_size=5, verbose=0)
    num_steps = [2 * (real_steps or dde_steps), 2 * dde_steps, 2]
    assert [part.num_steps for part in trained_parts(egm)] == num_steps
    of_networks = [part.optimizer for part in trained_parts(egm)]
    assert len({id(optimizer) for optimizer in of_networks}) == 3
    assert [float(optimizer.learning_rate) for optimizer in of_networks] == pytest.approx(rates)
    assert [optimizer.beta_1 for optimizer in of_networks] == betas
    assert [int(optimizer.iterations) for optimizer in of_networks] == num_steps
    for optimizer, net in zip(of_networks, egm.networks.values(), strict=True):
        assert len(optimizer.variables) == 2 + 2 * len(net.trainable_variables)  # two moments for each weight
        assert all(np.any(variable.numpy()) for variable in optimizer.variables)


# --- Logs ---


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_logs_are_means_over_the_points_of_an_epoch(make_model, monkeypatch):
    calls_of = record_losses(monkeypatch)
    model = compiled(make_model("range"), lambda: SGD(0.1), run_eagerly=True)
    x, after_batches = normal(10, 3), []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: after_batches.append(logs))
    options = {"validation_data": x, "validation_batch_size": 4, "callbacks": [callback], "verbose": 0}
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
        np.testing.assert_allclose([logs[name] for logs in after_batches], so_far, rtol=1e-4)
    if make_model is make_egm:  # the generator itself is measured, not the average of its weights
        _, fake_calls, generator_calls = calls_of(model)
        np.testing.assert_allclose(fake_calls[-1]["x"], model.generator(generator_calls[-1]["z"]), rtol=1e-5)


@pytest.mark.parametrize("make_model", [make_dde, make_egm])
def test_evaluation_repeats_itself(make_model):
    model = compiled(make_model("range"), lambda: SGD(0.0), run_eagerly=True)
    x, before = normal(10, 3), values_of(model.trainable_weights)
    first = model.evaluate(x, batch_size=4, verbose=0, return_dict=True)
    history = model.fit(x, validation_data=x, validation_batch_size=4, epochs=2, verbose=0).history
    assert model.evaluate(x, batch_size=4, verbose=0, return_dict=True) == first
    assert {name: history[f"val_{name}"] for name in first} == {name: [value] * 2 for name, value in first.items()}
    assert_equal_arrays(before, model.trainable_weights)


@pytest.mark.parametrize(("make_model", "kind"), [(make_dde, "images and range"), (make_egm, "range")])
def test_eager_and_graph_training_agree(make_model, kind):
    histories = []
    for run_eagerly in (True, False):
        model = compiled(make_model(kind), lambda: SGD(0.1), run_eagerly=run_eagerly)
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
