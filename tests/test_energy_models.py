import contextlib
import inspect
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

import energy_models
from energy_models import (
    DDE,
    EGM,
    GaussianLogDensity,
    NoiseScaling,
    RandomFourierFeatures,
    build_energy_net,
    build_generator,
    build_image_energy_net,
    build_image_generator,
)

KEY = tf.constant([3, 5], tf.uint64)
OTHER_KEY = tf.constant([3, 6], tf.uint64)
NOISE = {"fixed": 0.4, "range": (0.2, 1.5)}
DDE_KINDS = ["fixed", "range", "images", "images and range"]


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@contextlib.contextmanager
def double_precision():
    """Build and run networks in float64, so that finite differences are exact to many digits."""
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


@pytest.fixture(name="double_precision")
def double_precision_fixture():
    with double_precision():
        yield


def image_net(noise_conditional):
    """Build a network of 4 x 4 images that uses nothing of the module under test."""
    image, log_noise_std = keras.Input((4, 4, 1)), keras.Input((1,))
    hidden = keras.layers.Conv2D(3, 3, activation="tanh")(image)
    hidden = keras.layers.Flatten()(hidden)
    if noise_conditional:
        hidden = keras.layers.Concatenate()([hidden, log_noise_std])
    hidden = keras.layers.Dense(5, activation="silu")(hidden)
    inputs = [image, log_noise_std] if noise_conditional else image
    return keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(hidden))


def make_dde(kind, dual_weight=1.0, seed=7, net_seed=0):
    """Make a small DDE whose weights are all generic: no zero biases."""
    noise_std = NOISE["range" if "range" in kind else "fixed"]
    if "images" in kind:
        net = image_net("range" in kind)
    else:
        net = build_energy_net(3, "range" in kind, (6, 5), "tanh", num_features=4, feature_scale=0.8, data_std=1.3)
    net.set_weights([normal(*w.shape, seed=net_seed + i, scale=0.5) for i, w in enumerate(net.get_weights())])
    return DDE(net, noise_std, dual_weight=dual_weight, seed=seed)


def points_for(dde, n_points, seed=0):
    shape = dde.net.input_shape
    return normal(n_points, *(shape[0] if isinstance(shape, list) else shape)[1:], seed=seed)


def make_egm(kind="fixed", dde_steps=2, seed=11):
    generator = build_generator(2, 3, (6, 5), "tanh", num_features=4, feature_scale=0.5, data_std=1.3, seed=2)
    options = {"latents_per_point": 2, "average_decay": 0.15, "dde_steps": dde_steps, "seed": seed}
    return EGM(make_dde(kind), make_dde(kind, net_seed=50), generator, **options)


def zero_net(dim):
    """Build a network that has learned nothing: its score is zero everywhere."""
    return keras.Sequential([keras.Input((dim,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])


def identity_generator(*shape):
    return keras.Sequential([keras.Input(shape), keras.layers.Identity()])


def egm_parts(dim=2, noise_stds=(0.1, 0.1)):
    return (*(DDE(zero_net(2), noise_std, seed=0) for noise_std in noise_stds), identity_generator(dim))


def central_differences(function, x, step=1e-5):
    """Gradient (batch, *event) of ``function`` from (batch, *event) to (batch, 1), one coordinate at a time."""
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape[1:]):
        shift = np.zeros(x.shape[1:])
        shift[index] = step
        difference = np.asarray(function(x + shift)) - np.asarray(function(x - shift))
        gradient[(slice(None), *index)] = difference[:, 0] / (2 * step)
    return gradient


def level_differences(dde, x, log_noise_std, step=1e-5):
    """Derivative (batch, 1) of the log density along log(noise_std), by central differences."""
    above, below = (dde.net([x, log_noise_std + shift]) for shift in (step, -step))
    return np.asarray(above - below) / (2 * step)


def record_calls(monkeypatch, owner, name):
    """Keep the arguments (as arrays) and the result of each call of a method; the model has to run eagerly."""
    original, calls = getattr(owner, name), []

    def recording(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        arguments = inspect.signature(original).bind(self, *args, **kwargs).arguments
        arrays = {key: np.array(value) for key, value in arguments.items() if key != "self"}
        calls.append({"self": self, "result": float(result), **arrays})
        return result

    monkeypatch.setattr(owner, name, recording)
    return calls


def assert_equal_arrays(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def differ(one, other):
    """Whether any of two lists of arrays differ."""
    return any(not np.array_equal(left, right) for left, right in zip(one, other, strict=True))


# --- Log density, score, denoising ---


@pytest.mark.parametrize("kind", DDE_KINDS)
def test_score_is_the_gradient_of_the_log_density(kind):
    dde = make_dde(kind)
    x = points_for(dde, 9)
    with double_precision():
        exact = make_dde(kind)
        exact.net.set_weights(dde.net.get_weights())
        for level in [None, 0.2, 0.6, 1.5] if dde.noise_conditional else [None]:
            expected = central_differences(lambda y, level=level: exact.log_density(y, noise_std=level), np.float64(x))
            assert np.abs(expected).mean() > 0.05
            np.testing.assert_allclose(exact.score(np.float64(x), noise_std=level), expected, rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(dde.score(x, noise_std=level), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", DDE_KINDS)
def test_calling_returns_log_density_and_score(kind):
    dde = make_dde(kind)
    x = points_for(dde, 5)
    log_density, score = dde(x)
    assert log_density.shape == (5, 1)
    assert score.shape == x.shape
    np.testing.assert_allclose(log_density, dde.log_density(x), rtol=1e-6)
    np.testing.assert_allclose(score, dde.score(x), rtol=1e-6)
    inputs = [x, np.full((5, 1), np.log(0.2), np.float32)] if dde.noise_conditional else x  # None is the lowest level
    np.testing.assert_allclose(log_density, dde.net(inputs), rtol=1e-5)


@pytest.mark.parametrize("kind", ["range", "images and range"])
def test_levels_can_differ_between_points(kind):
    dde = make_dde(kind)
    x = points_for(dde, 4)
    levels = np.array([0.2, 0.5, 0.9, 1.5])
    for method in (dde.log_density, dde.score, dde.denoise):
        together = method(x, noise_std=levels)
        one_by_one = np.concatenate([method(x[i : i + 1], noise_std=levels[i]) for i in range(4)])
        np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-5)
        assert not np.allclose(together, method(x, noise_std=0.2), rtol=1e-2)
        np.testing.assert_allclose(together, method(x, noise_std=tf.constant(levels)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", DDE_KINDS)
def test_denoising_adds_the_score_times_the_variance_of_the_noise(kind):
    dde = make_dde(kind)
    x = points_for(dde, 6)
    for level in [0.2, 0.7] if dde.noise_conditional else [0.4]:
        expected = x + level**2 * dde.score(x, noise_std=level).numpy()
        np.testing.assert_allclose(dde.denoise(x, noise_std=level), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dde.denoise(x), dde.denoise(x, noise_std=0.2 if dde.noise_conditional else 0.4))


def test_points_of_any_float_type_are_accepted():
    dde = make_dde("range")
    x = points_for(dde, 4)
    for other in (x.astype(np.float64), tf.constant(x), tf.constant(x, tf.float64)):
        for method in (dde.log_density, dde.score, dde.denoise):
            np.testing.assert_array_equal(method(other, noise_std=0.5), method(x, noise_std=0.5))
        assert_equal_arrays(dde(other), dde(x))


# --- The loss ---


@pytest.mark.parametrize("kind", DDE_KINDS)
def test_noise_is_standard_normal_and_scaled_by_the_level(kind):
    dde = make_dde(kind)
    x = points_for(dde, 4000)
    noisy_x, noise, log_noise_std = (tensor.numpy() for tensor in dde.add_noise(tf.constant(x), KEY))
    assert log_noise_std.shape == (len(x), 1)
    levels = np.exp(log_noise_std.reshape(-1, *[1] * (x.ndim - 1)))
    np.testing.assert_allclose(noisy_x, x + levels * noise, rtol=1e-5, atol=1e-5)
    for column in noise.reshape(len(x), -1).T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(noise.reshape(len(x), -1).T), np.eye(x[0].size), atol=0.08)
    if dde.noise_conditional:
        low, high = np.log(NOISE["range"])
        assert stats.kstest(log_noise_std[:, 0], stats.uniform(low, high - low).cdf).pvalue > 1e-3
        assert len(np.unique(log_noise_std)) > 3900
        assert abs(stats.spearmanr(log_noise_std[:, 0], np.square(noise).reshape(len(x), -1).sum(1)).statistic) < 0.06
    else:
        np.testing.assert_allclose(levels, 0.4, rtol=1e-6)


@pytest.mark.parametrize("kind", ["fixed", "range"])
def test_noise_is_a_function_of_the_key(kind):
    dde = make_dde(kind)
    x = tf.constant(points_for(dde, 50))
    first, second, other = (dde.add_noise(x, key) for key in (KEY, KEY, OTHER_KEY))
    assert_equal_arrays(first, second)
    assert not np.isin(first[1], other[1]).any()
    if dde.noise_conditional:
        assert not np.isin(first[2], other[2]).any()


def test_level_does_not_depend_on_the_place_in_the_batch():
    dde = make_dde("range")
    x = tf.zeros((4, 3))
    levels = np.array([dde.add_noise(x, tf.constant([3, i], tf.uint64))[2][:, 0] for i in range(500)])  # (draws, 4)
    low, high = np.log(NOISE["range"])
    for place in levels.T:
        assert stats.kstest(place, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    # Stratified: one level in each quarter of the range.
    np.testing.assert_allclose(np.diff(np.sort(levels, axis=1), axis=1), (high - low) / 4, rtol=1e-4)


@pytest.mark.parametrize("sources_per_block", [3, 4, 8, 512])
@pytest.mark.parametrize("kind", DDE_KINDS)
@pytest.mark.parametrize("dual_weight", [0.0, 0.7])
def test_loss_equals_its_formula(kind, dual_weight, sources_per_block, double_precision, monkeypatch):
    # Each of 8 points meets its own noise and, in the term that involves the network, the mean of all that it may have
    # had: by Bayes' rule over the points of its block.
    monkeypatch.setattr(energy_models, "_SOURCES_PER_BLOCK", sources_per_block)
    dde = make_dde(kind, dual_weight=dual_weight)
    x = tf.constant(5 + points_for(dde, 8), tf.float64)
    noisy_x, noise, log_noise_std = (tensor.numpy() for tensor in dde.add_noise(x, KEY))
    score = central_differences(lambda y: dde.log_density(y, noise_std=tf.exp(log_noise_std)), noisy_x)
    dim = noise[0].size
    noise, score, noise_std = noise.reshape(8, dim), score.reshape(8, dim), np.exp(log_noise_std)
    level_derivative = level_differences(dde, noisy_x, log_noise_std)[:, 0] if dde.noise_conditional else None
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


def average_over_sources(x, noisy_x, noise_std):
    """Average the noise of points on a line, and its square; all arguments (n,)."""
    noise = (noisy_x - x) / noise_std
    mean_noise, square, mean_square = energy_models._average_over_sources(
        *(tf.constant(column[:, None]) for column in (x, noisy_x, noise, np.log(noise_std)))
    )
    np.testing.assert_allclose(square[:, 0], noise**2)
    return mean_noise.numpy()[:, 0], mean_square.numpy()[:, 0]


def test_averaging_over_sources_leaves_the_expected_gradient_as_it_is(monkeypatch):
    # For four fixed points, integrate over the noise of each by quadrature: noise and squared noise, which the
    # network's derivatives meet, may be averaged over the sources under any function of the noisy point.
    x, noise_std, y = np.array([0.0, 0.3, 0.5, 2.0]), 0.4, np.linspace(-4, 6, 4001)
    monkeypatch.setattr(energy_models, "_SOURCES_PER_BLOCK", len(x))
    functions = np.stack([np.sin(3 * y), y, np.cos(2 * y)])  # (function, len(y))
    own, averaged = 0, 0
    for i in range(len(x)):
        batches = np.tile(x, (len(y), 1))
        batches[:, i] = y
        means = average_over_sources(np.tile(x, len(y)), batches.ravel(), np.full(batches.size, noise_std))
        noise = (y - x[i]) / noise_std
        density = stats.norm.pdf(noise) / noise_std * (y[1] - y[0])
        own += functions * density @ np.stack([noise, noise**2], axis=1)
        averaged += functions * density @ np.stack([mean[i :: len(x)] for mean in means], axis=1)
    assert np.abs(own).min() > 0.05
    np.testing.assert_allclose(averaged, own, rtol=1e-9)


@pytest.mark.parametrize("noise_std", [0.1, 0.5, 2.0])
def test_averages_over_sources_keep_only_what_is_known_of_the_noise(noise_std):
    # Of points N(0, 1): the noise given y is N(s y / (1 + s^2), 1 / (1 + s^2)), so with r = s^2 / (1 + s^2) its mean
    # has the variance r, and the mean of its square 2 r^2; the noise itself has 1, its square 2.
    x, noise = normal(2, 2000).astype(np.float64)
    y = x + noise_std * noise
    mean_noise, mean_square = average_over_sources(x, y, np.full(2000, noise_std))
    r = noise_std**2 / (1 + noise_std**2)
    np.testing.assert_allclose(mean_noise.var(), r, atol=0.06)
    np.testing.assert_allclose(mean_square.var(), 2 * r**2, atol=0.15)
    assert abs(np.mean(mean_noise - noise_std * y / (1 + noise_std**2))) < 0.05


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_averages_keep_their_meaning_where_rounding_would_swamp_them(dtype):
    # Two far points and noise so small that their squared distances, as exponents, are beyond the digits of float32.
    x = np.array([-300, -300 + 1e-4, 300, 300.5], dtype)
    noise = np.array([0.5, -1.0, 2.0, 0.1], dtype)
    noise_std = np.full(4, 1e-3, dtype)
    mean_noise, _, mean_square = (
        result.numpy()[:, 0]
        for result in energy_models._average_over_sources(
            *(tf.constant(column[:, None]) for column in (x, x + noise_std * noise, noise, np.log(noise_std)))
        )
    )
    np.testing.assert_allclose(mean_noise[2:], noise[2:], atol=1e-3)
    np.testing.assert_allclose(mean_square[2:], noise[2:] ** 2, atol=1e-3)


@pytest.mark.parametrize("kind", ["range", "images and range"])
def test_dual_term_uses_the_derivative_along_the_level_of_each_point(kind, double_precision):
    with_dual, without = make_dde(kind, dual_weight=1.0), make_dde(kind, dual_weight=0.0)
    derivatives = []
    for i in range(6):
        x = tf.constant(points_for(with_dual, 1, seed=i), tf.float64)
        noisy_x, noise, log_noise_std = with_dual.add_noise(x, KEY + i)
        dual_term = with_dual.denoising_loss(x, KEY + i) - without.denoising_loss(x, KEY + i)
        derivatives.append(level_differences(with_dual, noisy_x, log_noise_std)[0, 0])
        dim = noise[0].numpy().size
        target = np.sum(noise.numpy() ** 2) - dim
        np.testing.assert_allclose(dual_term, (derivatives[-1] - target) ** 2 / (2 * dim), rtol=1e-6)
    assert np.ptp(derivatives) > 0.1


@pytest.mark.parametrize("kind", DDE_KINDS)
def test_gradient_of_the_loss_equals_finite_differences(kind, double_precision):
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
    x = tf.constant(mean + normal(400_000, 3, scale=std), tf.float32)
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
    lowest = float(dde.denoising_loss(x, KEY))
    np.testing.assert_allclose(lowest, minimum, rtol=0.01)
    perturbations += [("std", 0.1), ("std", -0.1), ("scale", 0.1), ("scale", -0.1)]
    perturbations += [("mean", 0.2 * sign * axis) for sign in (1, -1) for axis in np.eye(3)]
    for name, shift in perturbations:
        weight = getattr(layer, name)
        value = weight.numpy()
        weight.assign(value + shift)
        assert float(dde.denoising_loss(x, KEY)) > lowest + 1e-3, (name, shift)
        weight.assign(value)


@pytest.mark.parametrize("noise_std", [0.05, 0.5, 2.0, (0.05, 2.0)])
def test_losses_are_comparable_across_noise_levels(noise_std):
    # A network that has learned nothing: 1 at any level, and 1 more for the derivative along the level.
    if isinstance(noise_std, tuple):
        x, log_noise_std = keras.Input((3,)), keras.Input((1,))
        zero = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        net, expected = keras.Model([x, log_noise_std], zero(keras.layers.Concatenate()([x, log_noise_std]))), 1 + 1
    else:
        net, expected = zero_net(3), 1
    dde = DDE(net, noise_std, dual_weight=1.0, seed=0)
    np.testing.assert_allclose(dde.denoising_loss(tf.constant(normal(100_000, 3)), KEY), expected, rtol=0.02)


# --- Learning Gaussians, where everything is known ---

DATA_STD = 0.7


def fit_gaussian(noise_std, epochs):
    """Train a DDE on N(0, DATA_STD^2 I) in two dimensions."""
    conditional = isinstance(noise_std, tuple)
    net = build_energy_net(2, conditional, (32, 32), "tanh", num_features=4, feature_scale=0.5, data_std=2.0, seed=1)
    dde = DDE(net, noise_std, dual_weight=1.0, seed=2)
    x = normal(16_384, 2, scale=DATA_STD)
    dde.compile(Adam(CosineDecay(1e-2, epochs * 64)))
    dde.fit(x, batch_size=256, epochs=epochs, shuffle=False, verbose=0)
    return dde


@pytest.fixture(scope="module")
def gaussian_dde():
    return fit_gaussian(0.5, epochs=30)


@pytest.fixture(scope="module")
def gaussian_range_dde():
    return fit_gaussian((0.3, 1.5), epochs=40)


def bulk_points(variance):
    """Points within two standard deviations of N(0, variance I)."""
    points = normal(4000, 2, seed=8)
    return np.sqrt(variance) * points[np.linalg.norm(points, axis=1) < 2]


def relative_error(estimate, exact):
    return np.sqrt(np.mean((np.asarray(estimate) - exact) ** 2) / np.mean(exact**2))


def test_dde_recovers_the_score_of_a_gaussian(gaussian_dde):
    variance = DATA_STD**2 + 0.5**2
    x = bulk_points(variance)
    assert relative_error(gaussian_dde.score(x), -x / variance) < 0.05
    assert relative_error(gaussian_dde.denoise(x), DATA_STD**2 / variance * x) < 0.03
    log_density = gaussian_dde.log_density(x).numpy()[:, 0]
    exact = stats.multivariate_normal(cov=variance * np.eye(2)).logpdf(x)
    assert np.std(log_density - exact) < 0.03  # the constant is free


def test_dde_loss_reaches_its_minimum_on_a_gaussian(gaussian_dde):
    loss = gaussian_dde.evaluate(normal(200_000, 2, seed=9, scale=DATA_STD), batch_size=20_000, verbose=0)
    np.testing.assert_allclose(loss, 1 - 0.5**2 / (DATA_STD**2 + 0.5**2), rtol=0.02)


@pytest.mark.parametrize("level", [0.4, 0.8, 1.4])
def test_range_dde_recovers_the_score_of_a_gaussian_at_each_level(gaussian_range_dde, level):
    variance = DATA_STD**2 + level**2
    x = bulk_points(variance)
    assert relative_error(gaussian_range_dde.score(x, noise_std=level), -x / variance) < 0.05


def test_range_dde_has_one_constant_for_all_levels(gaussian_range_dde):
    x = bulk_points(DATA_STD**2)
    levels = [0.3, 0.6, 1.0, 1.5]
    estimates = [gaussian_range_dde.log_density(x, noise_std=level).numpy()[:, 0] for level in levels]
    exact = [stats.multivariate_normal(cov=(DATA_STD**2 + level**2) * np.eye(2)).logpdf(x) for level in levels]
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
    epochs, steps = 15, 64
    egm.compile(
        Adam(CosineDecay(1e-2, epochs * steps * egm.dde_steps), beta_1=0.5),
        Adam(CosineDecay(5e-3, epochs * steps), beta_1=0.5),
    )
    egm.fit(x, batch_size=len(x) // steps, epochs=epochs, shuffle=False, verbose=0)
    samples = egm.sample(50_000, seed=0)
    np.testing.assert_allclose(samples.mean(axis=0), mean, atol=0.1)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.1)


# --- The steps of an EGM ---


@pytest.mark.parametrize("kind", ["fixed", "range"])
@pytest.mark.parametrize("frozen", ["generator", "DDEs"])
def test_steps_leave_the_other_networks_alone(kind, frozen):
    egm = make_egm(kind)
    egm.compile(SGD(0.0 if frozen == "DDEs" else 0.01), SGD(0.0 if frozen == "generator" else 0.01), run_eagerly=True)
    parts = {name: getattr(egm, name) for name in ("dde_real", "dde_fake", "generator", "average_generator")}
    before = {name: part.get_weights() for name, part in parts.items()}
    egm.fit(normal(10, 3), batch_size=5, verbose=0)
    changed = {name for name, part in parts.items() if differ(before[name], part.get_weights())}
    assert changed == ({"generator", "average_generator"} if frozen == "DDEs" else {"dde_real", "dde_fake"})


@pytest.mark.parametrize("kind", ["fixed", "range"])
def test_generator_step_descends_the_kl_divergence(kind, monkeypatch):
    calls = record_calls(monkeypatch, EGM, "generator_loss")
    egm, untouched = make_egm(kind), make_egm(kind)
    egm.compile(SGD(0.1), SGD(1.0), run_eagerly=True)
    egm.train_on_batch(normal(7, 3))
    assert len(calls) == 1
    z, key = (tf.constant(calls[0][name]) for name in ("z", "key"))

    # The chain rule, written out: the mean over the batch of J_g(z)^T (score_fake(y) - score_real(y)).
    weights = untouched.generator.trainable_variables
    with tf.GradientTape() as tape:
        points = untouched.generator(z)
    jacobians = tape.jacobian(points, weights)  # each (batch, 3, *weight)
    noisy_y, _, log_noise_std = untouched.dde_fake.add_noise(points, key)
    levels = tf.exp(log_noise_std[:, 0])
    scores = {name: getattr(untouched, name).score(noisy_y, noise_std=levels) for name in ("dde_fake", "dde_real")}
    difference = (scores["dde_fake"] - scores["dde_real"]).numpy()
    for before, after, jacobian in zip(weights, egm.generator.trainable_variables, jacobians, strict=True):
        gradient = np.tensordot(difference, jacobian, axes=2) / len(z)
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_allclose(before.numpy() - after.numpy(), gradient, rtol=1e-3, atol=1e-6)

    log_densities = [getattr(untouched, name).log_density(noisy_y, noise_std=levels) for name in scores]
    np.testing.assert_allclose(calls[0]["result"], np.mean(log_densities[0] - log_densities[1]), rtol=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "range"])
def test_dde_steps_descend_the_loss_of_each_dde(kind, monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    egm, untouched = make_egm(kind, dde_steps=1), make_egm(kind, dde_steps=1)
    egm.compile(SGD(0.1), SGD(0.0), run_eagerly=True)
    x = normal(7, 3)
    egm.train_on_batch(x)
    calls = {"dde_real" if call["self"] is egm.dde_real else "dde_fake": call for call in calls}
    np.testing.assert_array_equal(calls["dde_real"]["x"], x)
    for name, call in calls.items():
        dde = getattr(untouched, name)
        with tf.GradientTape() as tape:
            loss = dde.denoising_loss(tf.constant(call["x"]), tf.constant(call["key"]))
        gradients = tape.gradient(loss, dde.trainable_variables)
        stepped = getattr(egm, name).trainable_variables
        for before, after, gradient in zip(dde.trainable_variables, stepped, gradients, strict=True):
            np.testing.assert_allclose(before - after, 0.1 * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dde_steps", [1, 3])
def test_each_inner_step_has_fresh_latents_and_noise(dde_steps, monkeypatch):
    loss_calls = record_calls(monkeypatch, DDE, "denoising_loss")
    generator_calls = record_calls(monkeypatch, EGM, "generator_loss")
    egm = make_egm(dde_steps=dde_steps)
    egm.compile(SGD(0.01), SGD(0.0), run_eagerly=True)  # the generator is fixed: other points are other latents
    x = normal(10, 3)
    egm.fit(x, batch_size=5, epochs=2, shuffle=False, verbose=0)
    num_batches = 4
    real_calls, fake_calls = (
        [call for call in loss_calls if call["self"] is dde] for dde in (egm.dde_real, egm.dde_fake)
    )
    assert len(generator_calls) == num_batches
    assert len(real_calls) == len(fake_calls) == num_batches * dde_steps
    keys = {tuple(call["key"]) for call in loss_calls + generator_calls}
    assert len(keys) == num_batches * (1 + 2 * dde_steps)
    for i, call in enumerate(real_calls):
        batch = i // dde_steps % 2
        np.testing.assert_array_equal(call["x"], x[5 * batch : 5 * batch + 5])
    generated = [call["x"] for call in fake_calls] + [egm.generator(call["z"]).numpy() for call in generator_calls]
    generated = np.concatenate(generated)
    assert generated.shape == (5 * num_batches * (egm.latents_per_point + dde_steps), 3)
    assert len(np.unique(generated, axis=0)) == len(generated)


def test_latents_and_noise_of_a_step_are_independent_standard_normals(monkeypatch):
    loss_calls = record_calls(monkeypatch, DDE, "denoising_loss")
    generator_calls = record_calls(monkeypatch, EGM, "generator_loss")
    egm = EGM(*egm_parts(), dde_steps=1, latents_per_point=1, seed=0)
    egm.compile(SGD(0.0), run_eagerly=True)
    x = normal(5000, 2)
    egm.train_on_batch(x)
    latents = [generator_calls[0]["z"], *(call["x"] for call in loss_calls if call["self"] is egm.dde_fake)]
    noise = [egm.dde_real.add_noise(tf.constant(x), call["key"])[1] for call in generator_calls + loss_calls]
    assert (len(latents), len(noise)) == (2, 3)
    for column in np.concatenate(latents + noise, axis=1).T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(np.concatenate(noise, axis=1).T), np.eye(6), atol=0.06)
    for z in latents:  # two draws of latents are one sequence with two random shifts
        np.testing.assert_allclose(np.corrcoef(np.concatenate([z, *noise], axis=1).T), np.eye(8), atol=0.06)


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_latents_of_a_batch_are_normal_and_spread_evenly(dim):
    egm = EGM(DDE(zero_net(dim), 0.1), DDE(zero_net(dim), 0.1), identity_generator(dim), seed=0)
    draw = tf.function(lambda key: egm._draw_latents(200, key))
    z = np.array([draw(tf.constant([0, i], tf.uint64)) for i in range(400)])  # (draws, 200, dim)
    assert z.shape == (400, 200, dim)
    for place in (0, 1, 199):  # each latent by itself
        for column in z[:, place].T:
            assert stats.kstest(column, "norm").pvalue > 1e-4
    # The share of a batch in a quarter of the space, and the means of its coordinates: unbiased, and less scattered
    # than those of independent latents.
    shares = (z[:, :, 0] < stats.norm.ppf(0.25)).mean(axis=1) if dim == 1 else (z[:, :, :2] < 0).all(2).mean(axis=1)
    assert abs(shares.mean() - 0.25) < 5 * shares.std() / 20 + 1e-9
    assert shares.std() < 0.5 * np.sqrt(0.25 * 0.75 / 200)
    assert (z.mean(axis=1).std(axis=0) < 0.5 / np.sqrt(200)).all()
    # In no other pair of coordinates are they worse than independent ones.
    products = np.einsum("bni,bnj->bij", z, z)[:, *np.triu_indices(dim, 1)] / 200
    assert (products.std(axis=0) < 1.2 / np.sqrt(200)).all()


def test_each_dde_training_step_has_fresh_noise(monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    dde = make_dde("fixed")
    dde.compile(SGD(0.01), run_eagerly=True)
    dde.fit(points_for(dde, 10), batch_size=4, epochs=2, verbose=0)
    dde.evaluate(points_for(dde, 10), batch_size=4, verbose=0)
    assert len({tuple(call["key"]) for call in calls}) == len(calls) == 3 * 3


@pytest.mark.parametrize("latents_per_point", [1, 3])
def test_generator_step_uses_several_latents_for_a_point(latents_per_point, monkeypatch):
    loss_calls = record_calls(monkeypatch, DDE, "denoising_loss")
    generator_calls = record_calls(monkeypatch, EGM, "generator_loss")
    egm = EGM(*egm_parts(), dde_steps=2, latents_per_point=latents_per_point, seed=0)
    egm.compile(SGD(0.0), run_eagerly=True)
    egm.fit(normal(7, 2), batch_size=5, verbose=0)
    assert [call["z"].shape for call in generator_calls] == [(size * latents_per_point, 2) for size in (5, 2)]
    assert [call["x"].shape for call in loss_calls] == [(5, 2)] * 4 + [(2, 2)] * 4


@pytest.mark.parametrize("average_decay", [0.0, 0.15])
def test_samples_come_from_a_moving_average_of_the_generator(average_decay):
    egm = make_egm()
    egm = EGM(egm.dde_real, egm.dde_fake, egm.generator, dde_steps=1, average_decay=average_decay, seed=0)
    assert_equal_arrays(egm.average_generator.get_weights(), egm.generator.get_weights())
    egm.compile(SGD(0.0), SGD(1.0), run_eagerly=True)
    decays = []
    for _ in range(5):
        before = np.concatenate([weight.ravel() for weight in egm.average_generator.get_weights()])
        egm.train_on_batch(normal(8, 3))
        current = np.concatenate([weight.ravel() for weight in egm.generator.get_weights()])
        after = np.concatenate([weight.ravel() for weight in egm.average_generator.get_weights()])
        decays.append(np.dot(after - current, before - current) / np.sum((before - current) ** 2))
        np.testing.assert_allclose(after, current + decays[-1] * (before - current), atol=1e-6)
    assert np.all(np.diff(decays) > -1e-4)  # it grows to the value asked for
    np.testing.assert_allclose(decays[-1], average_decay, atol=1e-4)
    if average_decay > 0:
        assert decays[0] < 0.9 * average_decay
        assert differ(egm.generator.get_weights(), egm.average_generator.get_weights())
    z = normal(5, 2)
    np.testing.assert_array_equal(egm(z), egm.average_generator(z))


@pytest.mark.parametrize("dde_steps", [1, 3])
def test_each_network_has_an_optimizer_of_its_own(dde_steps):
    egm = make_egm(dde_steps=dde_steps)
    given = Adam(0.02, beta_1=0.3), Adam(0.03)
    egm.compile(*given, run_eagerly=True)
    optimizers = [egm.dde_real_optimizer, egm.dde_fake_optimizer, egm.gen_optimizer]
    assert len({id(optimizer) for optimizer in optimizers}) == 3
    assert [float(optimizer.learning_rate) for optimizer in optimizers] == pytest.approx([0.02, 0.02, 0.03])
    assert [optimizer.beta_1 for optimizer in optimizers] == [0.3, 0.3, 0.9]
    egm.fit(normal(10, 3), batch_size=5, epochs=2, verbose=0)
    assert [int(optimizer.iterations) for optimizer in optimizers] == [4 * dde_steps, 4 * dde_steps, 4]
    for optimizer, part in zip(optimizers, (egm.dde_real, egm.dde_fake, egm.generator), strict=True):
        assert len(optimizer.variables) == 2 + 2 * len(part.trainable_variables)  # two moments for each weight
        assert all(np.any(variable.numpy()) for variable in optimizer.variables)


def test_one_optimizer_object_may_be_given_for_both():
    egm = make_egm()
    optimizer = RMSprop(0.01)
    egm.compile(optimizer, optimizer, run_eagerly=True)
    egm.fit(normal(10, 3), batch_size=5, verbose=0)
    assert [int(o.iterations) for o in (egm.dde_real_optimizer, egm.dde_fake_optimizer, egm.gen_optimizer)] == [4, 4, 2]


def test_default_optimizers_are_set():
    dde, egm = make_dde("fixed"), make_egm()
    dde.compile()
    egm.compile()
    optimizers = [dde.optimizer, egm.dde_real_optimizer, egm.dde_fake_optimizer, egm.gen_optimizer]
    assert all(isinstance(optimizer, keras.optimizers.Optimizer) and optimizer.built for optimizer in optimizers)
    assert egm.optimizer is None


# --- Logs ---


class BatchLogs(keras.callbacks.Callback):
    """Keep what the progress bar shows after each batch."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(logs)


def running_means(values):
    """Mean over the points seen so far in an epoch; values (epochs, 3) of batches of 4, 4 and 2 points."""
    return (np.cumsum(values * [4, 4, 2], axis=1) / [4, 8, 10]).ravel()


def test_dde_logs_the_mean_over_an_epoch(monkeypatch):
    calls = record_calls(monkeypatch, DDE, "denoising_loss")
    dde = make_dde("range")
    dde.compile(SGD(0.1), run_eagerly=True)
    x, batches = points_for(dde, 10), BatchLogs()
    options = {"validation_data": x, "validation_batch_size": 10, "callbacks": [batches], "verbose": 0}
    history = dde.fit(x, batch_size=4, epochs=2, **options).history
    assert set(history) == {"loss", "val_loss"}
    losses = np.reshape([call["result"] for call in calls], (2, 4))  # each epoch: three steps, then the validation
    assert np.ptp(losses[:, :3], axis=1).min() > 0.01
    np.testing.assert_allclose(history["loss"], losses[:, :3] @ [0.4, 0.4, 0.2], rtol=1e-5)  # batches of 4, 4, 2
    np.testing.assert_allclose(history["val_loss"], losses[:, 3], rtol=1e-5)
    np.testing.assert_allclose([logs["loss"] for logs in batches.logs], running_means(losses[:, :3]), rtol=1e-5)


def test_egm_logs_the_means_over_an_epoch(monkeypatch):
    loss_calls = record_calls(monkeypatch, DDE, "denoising_loss")
    generator_calls = record_calls(monkeypatch, EGM, "generator_loss")
    egm = make_egm("fixed", dde_steps=2)
    egm.compile(SGD(0.1), SGD(0.1), run_eagerly=True)
    batches = BatchLogs()
    history = egm.fit(normal(10, 3), batch_size=4, epochs=2, callbacks=[batches], verbose=0).history
    assert set(history) == {"loss_dde_real", "loss_dde_fake", "gen_loss"}
    losses = {
        "loss_dde_real": [call["result"] for call in loss_calls if call["self"] is egm.dde_real],
        "loss_dde_fake": [call["result"] for call in loss_calls if call["self"] is egm.dde_fake],
        "gen_loss": [call["result"] for call in generator_calls],
    }
    for name, values in losses.items():
        values = np.reshape(values, (2, 3, -1)).mean(axis=-1)  # (epochs, batches), the mean over the inner steps
        assert np.ptp(values, axis=1).min() > 1e-3
        np.testing.assert_allclose(history[name], values @ [0.4, 0.4, 0.2], rtol=1e-4)
        np.testing.assert_allclose([logs[name] for logs in batches.logs], running_means(values), rtol=1e-4)


def test_evaluation_repeats_itself():
    dde, egm = make_dde("range"), make_egm("range")
    dde.compile(SGD(0.0))
    egm.compile(SGD(0.0), SGD(0.0))
    for model in (dde, egm):
        x = points_for(dde, 10)
        first = model.evaluate(x, batch_size=4, verbose=0, return_dict=True)
        history = model.fit(x, validation_data=x, validation_batch_size=4, epochs=2, verbose=0).history
        assert model.evaluate(x, batch_size=4, verbose=0, return_dict=True) == first
        assert {name: history[f"val_{name}"] for name in first} == {name: [value] * 2 for name, value in first.items()}


def test_evaluation_averages_over_the_points(monkeypatch):
    loss_calls = record_calls(monkeypatch, DDE, "denoising_loss")
    generator_calls = record_calls(monkeypatch, EGM, "generator_loss")
    egm = make_egm()
    egm.compile(run_eagerly=True)
    before = egm.get_weights()
    logs = egm.evaluate(normal(10, 3), batch_size=4, verbose=0, return_dict=True)
    assert_equal_arrays(before, egm.get_weights())
    assert len({tuple(call["key"]) for call in generator_calls}) == 3
    for name, calls in {
        "loss_dde_real": [call for call in loss_calls if call["self"] is egm.dde_real],
        "loss_dde_fake": [call for call in loss_calls if call["self"] is egm.dde_fake],
        "gen_loss": generator_calls,
    }.items():
        np.testing.assert_allclose(logs[name], np.dot([0.4, 0.4, 0.2], [call["result"] for call in calls]), rtol=1e-5)


def test_egm_losses_are_comparable_across_noise_levels():
    for noise_std in (0.05, 2.0):
        egm = EGM(*egm_parts(noise_stds=(noise_std, noise_std)), seed=0)
        egm.compile(run_eagerly=True)
        logs = egm.evaluate(normal(50_000, 2), batch_size=50_000, verbose=0, return_dict=True)
        assert logs == pytest.approx({"loss_dde_real": 1, "loss_dde_fake": 1, "gen_loss": 0}, abs=0.02)


# --- Files ---


def make_compiled(kind):
    """Make a model with optimizers unlike the default ones; ``steps_per_execution`` stands for the other options."""
    if kind.startswith("EGM"):
        model = make_egm(kind.removeprefix("EGM "))
        model.compile(RMSprop(0.004, momentum=0.5), Adam(CosineDecay(0.01, 50), beta_1=0.3), steps_per_execution=2)
    else:
        model = make_dde(kind, dual_weight=0.7)
        model.compile(Adam(CosineDecay(0.01, 50), beta_1=0.3), steps_per_execution=2)
    return model


def optimizers_of(model):
    if isinstance(model, EGM):
        return [model.dde_real_optimizer, model.dde_fake_optimizer, model.gen_optimizer]
    return [model.optimizer]


def ddes_of(model):
    return [model.dde_real, model.dde_fake] if isinstance(model, EGM) else [model]


def load_without_warnings(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return keras.saving.load_model(path)


@pytest.mark.parametrize("kind", ["fixed", "range", "EGM fixed", "EGM range"])
def test_a_loaded_model_is_the_saved_one(kind, tmp_path):
    model = make_compiled(kind)
    x = normal(10, 3)
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(x, **options)
    model.save(tmp_path / "model.keras")
    loaded = load_without_warnings(tmp_path / "model.keras")

    assert type(loaded) is type(model)
    assert_equal_arrays(model.get_weights(), loaded.get_weights())
    if isinstance(model, EGM):
        z = normal(5, 2)
        np.testing.assert_array_equal(model(z), loaded(z))
        np.testing.assert_array_equal(model.sample(5, seed=1), loaded.sample(5, seed=1))
        assert (loaded.seed, loaded.dde_steps, loaded.latents_per_point, loaded.average_decay) == (11, 2, 2, 0.15)
        assert differ(loaded.generator.get_weights(), loaded.average_generator.get_weights())
    for saved_dde, loaded_dde in zip(ddes_of(model), ddes_of(loaded), strict=True):
        assert_equal_arrays(saved_dde(x), loaded_dde(x))
        assert loaded_dde.noise_std == NOISE["range" if "range" in kind else "fixed"]
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
    evaluations = [each.evaluate(x, batch_size=4, verbose=0, return_dict=True) for each in (model, loaded)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("model_class", [DDE, EGM])
def test_a_model_that_was_never_compiled_is_saved_with_its_options(model_class, tmp_path):
    # Values that nobody would make a default.
    if model_class is DDE:
        options = {"dual_weight": 0.37, "seed": 12345}
        model = DDE(image_net(True), (0.21, 0.34), **options)
    else:
        options = {"dde_steps": 7, "latents_per_point": 9, "average_decay": 0.123, "seed": 12345}
        model = EGM(*egm_parts(), **options)
    model.save(tmp_path / "model.keras")
    loaded = load_without_warnings(tmp_path / "model.keras")
    assert not loaded.compiled
    assert {name: getattr(loaded, name) for name in options} == options
    assert [dde.noise_std for dde in ddes_of(loaded)] == [dde.noise_std for dde in ddes_of(model)]
    assert_equal_arrays(model.get_weights(), loaded.get_weights())


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (RandomFourierFeatures, {"num_features": 5, "scale": 1.7, "seed": 3}),
        (NoiseScaling, {"data_std": 1.3}),
        (GaussianLogDensity, {"data_std": 1.3}),
    ],
)
def test_layers_keep_their_options(layer, options):
    copy = layer.from_config(layer(**options).get_config())
    assert {name: getattr(copy, name) for name in options} == options


def test_an_egm_of_trained_ddes_is_saved_with_their_optimizers(tmp_path):
    egm = make_egm()
    for dde in (egm.dde_real, egm.dde_fake):
        dde.compile(Adam(0.01), run_eagerly=True)
        dde.fit(normal(8, 3), batch_size=4, verbose=0)
    egm.save(tmp_path / "model.keras")
    loaded = load_without_warnings(tmp_path / "model.keras")
    for saved_dde, loaded_dde in zip(ddes_of(egm), ddes_of(loaded), strict=True):
        assert loaded_dde.compiled
        assert_equal_arrays(
            *([variable.numpy() for variable in each.optimizer.variables] for each in (saved_dde, loaded_dde))
        )


# --- Reproducibility and input kinds ---


class Batches(keras.utils.PyDataset):
    def __init__(self, x, batch_size):
        super().__init__()
        self.x, self.batch_size = x, batch_size

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __getitem__(self, index):
        return (self.x[index * self.batch_size : (index + 1) * self.batch_size],)


@pytest.mark.parametrize("model_class", [DDE, EGM])
def test_training_is_a_function_of_the_seed_and_the_batches(model_class):
    # Ten points in batches of four: the last batch is smaller.
    x = normal(10, 3)
    inputs = {
        "array": (x, {"batch_size": 4, "shuffle": False}),
        "float64 array": (x.astype(np.float64), {"batch_size": 4, "shuffle": False}),
        "tensor": (tf.constant(x), {"batch_size": 4, "shuffle": False}),
        "Dataset": (tf.data.Dataset.from_tensor_slices(x).batch(4), {"shuffle": False}),
        "PyDataset": (Batches(x, 4), {"shuffle": False}),
        "other seed": (x, {"batch_size": 4, "shuffle": False}),
    }
    results = {}
    if model_class is EGM:
        inputs = {name: inputs[name] for name in ("array", "Dataset", "PyDataset", "other seed")}
    for name, (data, options) in inputs.items():
        seed = 1 if name == "other seed" else 0
        model = make_dde("range", seed=seed) if model_class is DDE else make_egm("range", dde_steps=1, seed=seed)
        model.compile(*[SGD(0.1)] * (1 if model_class is DDE else 2))
        history = model.fit(data, epochs=2, verbose=0, **options).history
        results[name] = [*history.values(), *model.get_weights()]
        if name == "Dataset":
            evaluations = [model.evaluate(each, verbose=0) for each in (data, Batches(x, 4))]
            assert evaluations[0] == evaluations[1]
    for name in results:
        if name == "other seed":
            assert differ(results["array"], results[name])
        else:
            assert_equal_arrays(results["array"], results[name])


def test_eager_and_graph_training_agree():
    histories = []
    for run_eagerly in (True, False):
        egm = make_egm("fixed")
        egm.compile(SGD(0.1), SGD(0.1), run_eagerly=run_eagerly)
        histories.append(egm.fit(normal(10, 3), batch_size=4, shuffle=False, verbose=0).history)
    for name in histories[0]:
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-4)


def test_seed_none_draws_one_from_python():
    for make_model in (lambda: DDE(zero_net(2), 0.1), lambda: EGM(*egm_parts())):
        seeds = []
        for python_seed in (0, 0, 1):
            random.seed(python_seed)
            seeds.append(make_model().seed)
        assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("kind", ["fixed", "range", "images"])
def test_dde_predicts_in_batches(kind):
    dde = make_dde(kind)
    x = points_for(dde, 10)
    for predicted, expected in zip(dde.predict(x, batch_size=4, verbose=0), dde(x), strict=True):
        np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


def test_egm_maps_latents_to_points():
    egm = make_egm()
    z = normal(10, 2)
    np.testing.assert_array_equal(egm(z), egm.generator(z))  # before training the average is the generator
    np.testing.assert_allclose(egm.predict(z, batch_size=4, verbose=0), egm(z), rtol=1e-4, atol=1e-5)


def test_dde_of_images_trains():
    dde = make_dde("images and range")
    dde.compile(Adam(0.01))
    losses = dde.fit(points_for(dde, 64), batch_size=32, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# --- Samples of an EGM ---


def test_samples_are_the_generator_at_standard_normal_latents():
    egm = EGM(*egm_parts(), seed=0)
    samples = egm.sample(100_000, seed=3)  # more than are generated at a time
    assert isinstance(samples, np.ndarray)
    assert samples.shape == (100_000, 2)
    assert len(np.unique(samples, axis=0)) == len(samples)
    for column in samples.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.02


def test_samples_depend_on_their_seed():
    egm = make_egm()
    np.testing.assert_array_equal(egm.sample(5, seed=3), egm.sample(5, seed=3))
    assert not np.isin(egm.sample(5, seed=3), egm.sample(5, seed=4)).any()
    assert not np.isin(egm.sample(5), egm.sample(5)).any()
    assert egm.sample(np.int64(1), seed=3).shape == (1, 3)


def test_events_may_have_any_shape():
    nets = [make_dde("images").net, make_dde("images", net_seed=20).net]
    egm = EGM(DDE(nets[0], 0.4), DDE(nets[1], 0.4), identity_generator(4, 4, 1), seed=0)
    assert egm.sample(3, seed=0).shape == (3, 4, 4, 1)


# --- Networks ---


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("noise_conditional", [False, True])
def test_energy_net_returns_one_number_a_point(dim, noise_conditional):
    net = build_energy_net(dim, noise_conditional, (6, 6), num_features=3)
    inputs = [normal(4, dim), normal(4, 1)] if noise_conditional else normal(4, dim)
    assert net(inputs).shape == (4, 1)
    assert net.output_shape == (None, 1)
    widths = [layer.units for layer in net.layers if isinstance(layer, keras.layers.Dense)]
    assert widths == [6, 6, 1]


@pytest.mark.parametrize(("latent_dim", "dim"), [(1, 1), (2, 2), (4, 3)])
def test_generator_maps_latents_to_points(latent_dim, dim):
    generator = build_generator(latent_dim, dim, (6, 6), num_features=3)
    assert generator(normal(4, latent_dim)).shape == (4, dim)
    widths = [layer.units for layer in generator.layers if isinstance(layer, keras.layers.Dense)]
    assert widths == [6, 6, dim]


def test_generator_starts_as_the_identity_scaled_to_the_data():
    z = normal(500, 2)
    y = build_generator(2, 2, (32, 32), "relu", num_features=8, feature_scale=1.0, data_std=1.7, seed=0)(z)
    assert relative_error(y, 1.7 * z) < 0.2


@pytest.mark.parametrize("build", [build_energy_net, build_generator])
def test_initial_weights_are_a_function_of_the_seed(build):
    first, same, other = (build(widths=(6, 6, 6), num_features=3, seed=seed).get_weights() for seed in (4, 4, 5))
    assert_equal_arrays(first, same)
    for one, two in zip(first, other, strict=True):
        assert not np.any(one) or not np.isin(one, two).any()  # biases start at zero
    for one, two in itertools.combinations(first, 2):
        if one.shape == two.shape and np.any(one):
            assert not np.isin(one, two).any()


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (
            build_energy_net,
            {"activation": "silu", "num_features": 5, "feature_scale": 2.0, "data_std": 3.0, "widths": (6,), "seed": 1},
        ),
        (
            build_generator,
            {"activation": "tanh", "num_features": 5, "feature_scale": 2.0, "data_std": 3.0, "widths": (6,), "seed": 1},
        ),
    ],
)
def test_every_option_of_a_network_matters(build, changes):
    options = {"widths": (6, 6), "num_features": 3, "feature_scale": 1.0, "data_std": 2.0}
    reference = build(**options)(normal(4, 2))
    for name, value in changes.items():
        assert not np.allclose(build(**options | {name: value})(normal(4, 2)), reference), name


@pytest.mark.parametrize(("dim", "num_frequencies"), [(2, 64), (3, 64), (4, 0), (63, 0)])
def test_waves_are_left_out_in_many_dimensions(dim, num_frequencies):
    for num_features in (None, num_frequencies):
        net = build_energy_net(dim, True, (4,), num_features=num_features)
        found = [layer.num_features for layer in net.layers if isinstance(layer, RandomFourierFeatures)]
        assert found == ([num_frequencies] if num_frequencies else [])
        assert net([normal(5, dim), normal(5, 1)]).shape == (5, 1)


def test_noise_scaling_makes_points_equally_wide():
    x = 1.7 * normal(5000, 3)
    levels = np.geomspace(0.1, 10, 5000, dtype=np.float32)[:, None]
    noisy = x + levels * normal(5000, 3, seed=1)
    scaled = NoiseScaling(1.7)(noisy, np.log(levels))
    np.testing.assert_allclose(scaled, noisy / np.hypot(1.7, levels), rtol=1e-5)
    np.testing.assert_allclose(np.std(np.split(scaled.numpy(), 5), axis=(1, 2)), 1, rtol=0.05)
    images = np.reshape(noisy, (5000, 1, 3, 1))
    np.testing.assert_allclose(np.reshape(NoiseScaling(1.7)(images, np.log(levels)), (5000, 3)), scaled, rtol=1e-5)
    np.testing.assert_allclose(NoiseScaling(1.7)(x), x / 1.7, rtol=1e-5)


def test_networks_are_built_in_silence(capsys):
    build_energy_net(noise_conditional=True, widths=(4,), num_features=2)
    build_generator(widths=(4,), num_features=2)
    make_egm().compile()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("kind", ["fixed", "range"])
def test_every_weight_gets_a_gradient(kind):
    egm = make_egm(kind)
    with tf.GradientTape(persistent=True) as tape:
        loss = egm.dde_real.denoising_loss(tf.constant(normal(16, 3)), KEY)
        generator_loss = egm.generator_loss(tf.constant(normal(16, 2)), KEY)
    for value, part in ((loss, egm.dde_real), (generator_loss, egm.generator)):
        for variable, gradient in zip(
            part.trainable_variables, tape.gradient(value, part.trainable_variables), strict=True
        ):
            assert gradient is not None, variable.path
            assert np.any(gradient.numpy()), variable.path


def test_fourier_features_equal_their_formula():
    layer = RandomFourierFeatures(num_features=2000, scale=1.7, seed=3)
    x = normal(4, 2)
    features = layer(x).numpy()
    assert layer.trainable_variables == []
    frequencies = layer.get_weights()[0]
    assert frequencies.shape == (2, 2000)
    assert stats.kstest(frequencies.ravel(), stats.norm(scale=1.7).cdf).pvalue > 1e-3
    expected = np.concatenate([x, np.sin(x @ frequencies), np.cos(x @ frequencies)], axis=1)
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_fourier_features_of_a_level_are_blurred_by_its_noise():
    layer = RandomFourierFeatures(num_features=6, scale=1.2, seed=3)
    x, levels = normal(3, 2), np.array([0.1, 0.5, 1.5])
    features = layer(x, np.log(levels, dtype=np.float32)[:, None]).numpy()
    frequencies = layer.get_weights()[0]  # (2, 6)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    noise = levels[:, None, None] * np.linalg.norm(frequencies, axis=0)[:, None] * nodes  # (3, 6, 80), of the phase
    phases = (x @ frequencies)[:, :, None] + noise
    expected = [np.average(wave(phases), axis=-1, weights=weights) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(features, np.concatenate([x, *expected], axis=1), atol=1e-5)


def test_base_measure_is_a_normalised_gaussian():
    layer = GaussianLogDensity(data_std=1.5)
    x, levels = normal(4, 3), np.array([0.1, 0.5, 1.0, 3.0])
    expected = stats.multivariate_normal(cov=1.5**2 * np.eye(3)).logpdf(x)
    np.testing.assert_allclose(layer(x)[:, 0], expected, rtol=1e-5)
    expected = [
        stats.multivariate_normal(cov=(1.5**2 + s**2) * np.eye(3)).logpdf(y) for y, s in zip(x, levels, strict=True)
    ]
    np.testing.assert_allclose(layer(x, np.log(levels, dtype=np.float32)[:, None])[:, 0], expected, rtol=1e-5)


def test_energy_net_without_its_last_layer_is_the_base_measure():
    net = build_energy_net(3, True, (5,), num_features=2, data_std=1.5)
    last_layer = [layer for layer in net.layers if isinstance(layer, keras.layers.Dense)][-1]
    last_layer.set_weights([np.zeros((5, 1))])
    x = normal(4, 3)
    expected = stats.multivariate_normal(cov=(1.5**2 + 0.7**2) * np.eye(3)).logpdf(x)
    np.testing.assert_allclose(DDE(net, (0.5, 1.0)).log_density(x, noise_std=0.7)[:, 0], expected, rtol=1e-5)


# --- Bad input ---

BAD_NOISE = [0, -1, float("nan"), float("inf"), "0.1", None, True, (1.0, 0.1), (0.1, 0.1, 0.2), (0.0, 1.0), (0.1,), ()]


@pytest.mark.parametrize("noise_std", BAD_NOISE, ids=repr)
def test_bad_noise_is_refused(noise_std):
    with pytest.raises(ValueError, match=r"positive finite number.*got ") as caught:
        DDE(zero_net(2), noise_std)
    assert repr(noise_std) in str(caught.value)


@pytest.mark.parametrize(
    "noise_std", [1, np.float32(0.5), np.float64(0.5), (0.1, 1), [0.1, 1.0], np.array([0.1, 1.0])], ids=repr
)
def test_noise_of_any_number_type_is_accepted(noise_std):
    conditional = np.ndim(noise_std) == 1
    dde = DDE(build_energy_net(noise_conditional=conditional, widths=(3,), num_features=2), noise_std)
    assert dde.noise_range == pytest.approx(tuple(noise_std) if conditional else (noise_std, noise_std))
    assert dde.noise_conditional == conditional


@pytest.mark.parametrize("seed", [-1, 1.5, True, 2**31, "0"], ids=repr)
def test_bad_seeds_are_refused(seed):
    egm = make_egm()
    for use in (
        lambda: DDE(zero_net(2), 0.1, seed=seed),
        lambda: EGM(*egm_parts(), seed=seed),
        lambda: egm.sample(3, seed=seed),
        lambda: build_energy_net(seed=seed),
        lambda: build_generator(seed=seed),
    ):
        with pytest.raises(ValueError, match=r"seed must be None or an integer from 0") as caught:
            use()
        assert repr(seed) in str(caught.value)


@pytest.mark.parametrize("dual_weight", [-1, float("nan"), "1"], ids=repr)
def test_bad_dual_weight_is_refused(dual_weight):
    with pytest.raises(ValueError, match="dual_weight must be a finite number of at least 0, got") as caught:
        make_dde("range", dual_weight=dual_weight)
    assert repr(dual_weight) in str(caught.value)


def test_network_with_ten_outputs_is_refused():
    with pytest.raises(ValueError, match=r"shape \(batch, 1\); got shape \(None, 10\)"):
        DDE(keras.Sequential([keras.Input((2,)), keras.layers.Dense(10)]), 0.1)
    not_yet_built = DDE(keras.Sequential([keras.layers.Dense(10)]), 0.1)
    for method in (not_yet_built, not_yet_built.log_density):
        with pytest.raises(ValueError, match=r"shape \(batch, 1\); got shape \(4, 10\)"):
            method(normal(4, 2))


def test_network_that_does_not_fit_the_noise_is_refused():
    options = {"widths": (3,), "num_features": 2}
    with pytest.raises(ValueError, match=r"must have 2 input\(s\).*log\(noise_std\).*got 1"):
        DDE(build_energy_net(noise_conditional=False, **options), (0.1, 1.0))
    with pytest.raises(ValueError, match=r"must have 1 input\(s\).*got 2"):
        DDE(build_energy_net(noise_conditional=True, **options), 0.1)


@pytest.mark.parametrize(
    "net", [None, "net", np.square, make_dde], ids=["None", "text", "function of NumPy", "function"]
)
def test_networks_that_are_none_are_refused(net):
    with pytest.raises(ValueError, match=r"net must be a keras\.Model, got"):
        DDE(net, 0.1)
    dde, other, generator = egm_parts()
    with pytest.raises(ValueError, match=r"generator must be a keras\.Model, got"):
        EGM(dde, other, net)
    with pytest.raises(ValueError, match="dde_real must be a DDE, got"):
        EGM(net, other, generator)
    with pytest.raises(ValueError, match="dde_fake must be a DDE, got"):
        EGM(dde, net, generator)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (3, 3, 1)], ids=repr)
def test_points_of_another_shape_are_refused(shape):
    dde = make_dde("fixed")
    dde.compile(SGD(0.1), run_eagerly=True)
    methods = [dde, dde.log_density, dde.score, dde.denoise]
    methods += [lambda x: dde.fit(x, verbose=0), lambda x: dde.evaluate(x, verbose=0)] if len(shape) > 1 else []
    for method in methods:
        with pytest.raises(ValueError, match=r"shape \((batch|n), 3\), got \("):
            method(np.zeros(shape, np.float32))


@pytest.mark.parametrize("noise_std", [0.1, 1.6, 0, -1, float("nan"), [0.3, 0.3, 9.0]], ids=repr)
def test_level_out_of_range_is_refused(noise_std):
    dde = make_dde("range")
    for method in (dde, dde.log_density, dde.score, dde.denoise):
        with pytest.raises(ValueError, match=r"noise_std must be within \[0\.2, 1\.5\].*got ") as caught:
            method(normal(3, 3), noise_std=noise_std)
        assert repr(noise_std) in str(caught.value)
    with pytest.raises(ValueError, match=r"within \[0\.4, 0\.4\].*got 0\.5"):
        make_dde("fixed").score(normal(3, 3), noise_std=0.5)


@pytest.mark.parametrize("noise_std", [[0.3, 0.5], [[0.3, 0.5, 0.7]]], ids=repr)
def test_levels_that_do_not_fit_the_points_are_refused(noise_std):
    dde = make_dde("range")
    for method in (dde, dde.log_density, dde.score, dde.denoise):
        with pytest.raises(ValueError, match=r"noise_std must be a number or one a point, \(3,\); got shape "):
            method(normal(3, 3), noise_std=np.array(noise_std))


IMAGES = {"image_shape": (8, 4, 2), "filters": (5, 6), "units": 7}


@pytest.mark.parametrize("noise_conditional", [False, True])
def test_image_energy_net_returns_one_number_an_image(noise_conditional):
    net = build_image_energy_net(**IMAGES, noise_conditional=noise_conditional)
    x, level = normal(4, 8, 4, 2), normal(4, 1)
    assert net([x, level] if noise_conditional else x).shape == (4, 1)
    convolutions = [layer for layer in net.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [5, 6]
    assert convolutions[0].kernel.shape[2] == 2 + noise_conditional
    if noise_conditional:
        assert not np.allclose(net([x, level]), net([x, level + 1]))


def test_far_images_have_the_log_density_of_the_gaussian_around_the_mean():
    mean = normal(8, 4, 2, seed=1)
    net = build_image_energy_net(**IMAGES, data_mean=mean, data_std=0.4)
    x = 1e3 * normal(4, 8, 4, 2)
    expected = -np.sum((x - mean) ** 2, axis=(1, 2, 3)) / (2 * 0.4**2)
    np.testing.assert_allclose(net(x)[:, 0], expected, rtol=1e-3)


@pytest.mark.parametrize("filters", [(), (5,), (6, 5)])
def test_image_generator_starts_as_a_linear_map(filters):
    components, mean = normal(3, 8, 4, 2), normal(8, 4, 2, seed=1)
    generator = build_image_generator(components, mean, widths=(7,), filters=filters)
    z = normal(500, 3, seed=2)
    y = generator(z)
    assert y.shape == (500, 8, 4, 2)
    assert relative_error(y, mean + np.einsum("nk,khwc->nhwc", z, components)) < 0.1
    convolutions = [layer.filters for layer in generator.layers if isinstance(layer, keras.layers.Conv2DTranspose)]
    assert convolutions == [*filters[1:], 2][: len(filters)]


def test_every_option_of_an_image_network_matters():
    x, z = normal(4, 8, 4, 2), normal(4, 3)
    reference = build_image_energy_net(**IMAGES)(x)
    changes = {
        "filters": (5,),
        "units": 3,
        "activation": "tanh",
        "data_mean": 0.1,
        "data_std": 1.0,
    }
    for name, value in {**changes, "seed": 1}.items():
        assert not np.allclose(build_image_energy_net(**IMAGES | {name: value})(x), reference), name
    components = normal(3, 8, 4, 2)
    reference = build_image_generator(components)(z)
    for name, value in {"data_mean": 0.1, "widths": (4,), "filters": (5,), "seed": 1}.items():
        assert not np.array_equal(build_image_generator(components, **{name: value})(z), reference), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (8, 8)}, r"image_shape must be \(height, width, channels\), got \(8, 8\)"),
        ({"image_shape": (8, 0, 1)}, "each of image_shape must be an integer of at least 1, got 0"),
        ({"filters": 4}, "filters must be a sequence of integers, got 4"),
        ({"filters": (4, 2.5)}, "each of filters must be an integer of at least 1, got 2.5"),
        ({"units": 0}, "each of widths must be an integer of at least 1, got 0"),
        ({"data_mean": np.zeros(3)}, r"data_mean must be a number or of shape \(8, 8, 1\), got shape \(3,\)"),
        ({"data_mean": float("nan")}, "data_mean must be made of finite numbers"),
        ({"data_std": 0}, "data_std must be a positive finite number, got 0"),
    ],
)
def test_bad_arguments_of_image_energy_nets_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_image_energy_net(**changes)


def test_bad_arguments_of_image_generators_are_refused():
    components = normal(3, 8, 4, 2)
    with pytest.raises(ValueError, match=r"components must be finite .* got shape \(3, 8, 4\)"):
        build_image_generator(components[..., 0])
    with pytest.raises(ValueError, match="components must be finite"):
        build_image_generator(np.full((3, 8, 4, 2), np.inf))
    with pytest.raises(ValueError, match=r"3 filters need a height and width divisible by 8, got \(8, 4, 2\)"):
        build_image_generator(components, filters=(2, 2, 2))
    with pytest.raises(ValueError, match="each of widths must be an integer of at least 1, got 0"):
        build_image_generator(components, widths=(0,))


def test_frozen_real_dde_stays_as_it_is_and_is_measured():
    def train(is_frozen):
        ddes = [DDE(build_energy_net(2, True, (6,), seed=seed), (0.2, 1.0), seed=seed) for seed in (0, 1)]
        ddes[0].trainable = not is_frozen
        egm = EGM(*ddes, build_generator(2, 2, (6,), seed=2), dde_steps=2, seed=3)
        egm.compile()
        before = egm.dde_real.get_weights()
        losses = egm.fit(normal(16_384, 2), batch_size=4096, epochs=2, shuffle=False, verbose=0).history
        is_same = all(np.array_equal(*pair) for pair in zip(before, egm.dde_real.get_weights(), strict=True))
        assert egm.num_steps == 8
        return egm, is_same, losses

    egm, is_same, losses = train(is_frozen=True)
    assert is_same
    assert not train(is_frozen=False)[1]
    egm.dde_real.compile()
    expected = egm.dde_real.evaluate(normal(20_000, 2), batch_size=5000, verbose=0)
    np.testing.assert_allclose(losses["loss_dde_real"], expected, rtol=0.1)


@pytest.mark.filterwarnings("error:Skipping variable loading")
@pytest.mark.parametrize("compiled_again", [False, True])
def test_frozen_real_dde_is_frozen_after_loading(tmp_path, compiled_again):
    ddes = [DDE(build_energy_net(2, True, (6,), seed=seed), (0.2, 1.0), seed=seed) for seed in (0, 1)]
    ddes[0].compile()
    ddes[0].fit(normal(64, 2), verbose=0)
    ddes[0].trainable = False
    if compiled_again:
        ddes[0].compile()
    egm = EGM(*ddes, build_generator(2, 2, (6,), seed=2), dde_steps=2, seed=3)
    egm.compile()
    egm.fit(normal(64, 2), batch_size=16, verbose=0)
    egm.save(tmp_path / "egm.keras")
    loaded = EGM.load(tmp_path / "egm.keras")
    slots = [[variable.numpy() for variable in dde.optimizer.variables] for dde in (ddes[0], loaded.dde_real)]
    assert_equal_arrays(*slots)
    losses = [model.fit(normal(64, 2), batch_size=16, epochs=2, initial_epoch=1, verbose=0) for model in (egm, loaded)]
    assert losses[0].history == losses[1].history
    assert_equal_arrays(egm.get_weights(), loaded.get_weights())
    assert_equal_arrays(loaded.dde_real.get_weights(), ddes[0].get_weights())


@pytest.mark.parametrize("name", ["dim", "num_features", "latent_dim", "widths"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None], ids=repr)
def test_bad_sizes_of_networks_are_refused(name, value):
    for build in (build_generator,) if name == "latent_dim" else (build_energy_net, build_generator):
        if (build, name) == (build_energy_net, "num_features") and value in (0, None) and value is not False:
            continue  # allowed
        with pytest.raises(ValueError, match=f"{name}.* must be an integer of at least 1, got") as caught:
            build(**{name: (4, value) if name == "widths" else value})
        assert repr(value) in str(caught.value)
        with pytest.raises(ValueError, match="widths must be a sequence of integers, got 4"):
            build(widths=4)


@pytest.mark.parametrize("name", ["feature_scale", "data_std"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None], ids=repr)
def test_bad_scales_of_networks_are_refused(name, value):
    for build in (build_energy_net, build_generator):
        with pytest.raises(ValueError, match=f"{name} must be a positive finite number, got") as caught:
            build(**{name: value})
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["dde_steps", "latents_per_point"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "5", None], ids=repr)
def test_bad_numbers_of_steps_and_latents_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got") as caught:
        EGM(*egm_parts(), **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("average_decay", [-0.1, 1, 1.5, float("nan"), "0.9", None], ids=repr)
def test_bad_average_decay_is_refused(average_decay):
    with pytest.raises(ValueError, match="average_decay must be at least 0 and less than 1, got") as caught:
        EGM(*egm_parts(), average_decay=average_decay)
    assert repr(average_decay) in str(caught.value)


@pytest.mark.parametrize("n_samples", [0, -1, 2.5, True, "5", None], ids=repr)
def test_bad_number_of_samples_is_refused(n_samples):
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got") as caught:
        EGM(*egm_parts()).sample(n_samples)
    assert repr(n_samples) in str(caught.value)


def test_generator_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"shape \(batch, 2\) to fit dde_real, got \(batch, 3\)"):
        EGM(*egm_parts(dim=3))
    with pytest.raises(ValueError, match=r"shape \(batch, 4, 4, 1\) to fit dde_real, got \(batch, 16\)"):
        EGM(make_dde("images"), make_dde("images"), identity_generator(16))


def test_ddes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match=r"the same noise_std, got 0\.1 and 0\.2"):
        EGM(*egm_parts(noise_stds=(0.1, 0.2)))
    dde, other, generator = egm_parts()
    with pytest.raises(ValueError, match="two DDEs with a network each, got one used twice"):
        EGM(dde, dde, generator)
    with pytest.raises(ValueError, match="two DDEs with a network each, got one used twice"):
        EGM(dde, DDE(dde.net, 0.1), generator)
    with pytest.raises(ValueError, match="shapes of dde_fake must be known"):
        EGM(dde, DDE(keras.Sequential([keras.layers.Dense(1)]), 0.1), generator)
    with pytest.raises(ValueError, match="shapes of generator must be known"):
        EGM(dde, other, keras.Sequential([keras.layers.Dense(2)]))


def test_network_without_an_input_is_built_by_training(tmp_path):
    net = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(1, use_bias=False)])
    dde = DDE(net, 0.5, seed=0)
    dde.compile(Adam(1e-2))
    dde.fit(normal(256, 2), batch_size=32, epochs=1, verbose=0)
    assert int(dde.optimizer.iterations) == 8
    dde.save(tmp_path / "dde.keras")
    loaded = keras.saving.load_model(tmp_path / "dde.keras")
    x = normal(5, 2, seed=1)
    np.testing.assert_array_equal(loaded.log_density(x), dde.log_density(x))


@pytest.mark.parametrize("noise_std", [(0.2, 0.2), np.ones((2, 2)), np.array(0.1), (0.1,)], ids=repr)
def test_noise_that_is_neither_a_number_nor_a_range_is_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std must be a positive finite number, or a pair"):
        DDE(build_energy_net(), noise_std)
