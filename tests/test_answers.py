import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD
from scipy import stats
from small_models import (
    DDE_KINDS,
    KEY,
    NOISE,
    OTHER_KEY,
    assert_equal_arrays,
    central_differences,
    differ,
    double_precision,
    egm_parts,
    identity_generator,
    make_dde,
    make_egm,
    normal,
    points_for,
)

from energy_models import EGM


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
def test_log_density_score_and_denoised_points_fit_together(kind):
    dde = make_dde(kind)
    x = points_for(dde, 5)
    log_density, score = dde(x)
    assert log_density.shape == (5, 1)
    assert score.shape == x.shape
    np.testing.assert_allclose(log_density, dde.log_density(x), rtol=1e-6)
    np.testing.assert_allclose(score, dde.score(x), rtol=1e-6)
    inputs = [x, np.full((5, 1), np.log(0.2), np.float32)] if dde.noise_conditional else x  # None is the lowest level
    np.testing.assert_allclose(log_density, dde.net(inputs), rtol=1e-5)
    for level in [0.2, 0.7] if dde.noise_conditional else [0.4]:
        expected = x + level**2 * dde.score(x, noise_std=level).numpy()
        np.testing.assert_allclose(dde.denoise(x, noise_std=level), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dde.denoise(x), dde.denoise(x, noise_std=0.2 if dde.noise_conditional else 0.4))


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


def test_points_of_any_float_type_are_accepted():
    dde = make_dde("range")
    x = points_for(dde, 4)
    for method in (dde.log_density, dde.score, dde.denoise, dde):
        expected = tf.nest.flatten(method(x, noise_std=0.5))
        for other in (x.astype(np.float64), tf.constant(x), tf.constant(x, tf.float64)):
            assert_equal_arrays(tf.nest.flatten(method(other, noise_std=0.5)), expected)


@pytest.mark.parametrize(("make_model", "kind"), [(make_dde, "fixed"), (make_dde, "images"), (make_egm, "range")])
def test_models_predict_in_batches(make_model, kind):
    model = make_model(kind)
    x = normal(10, *getattr(model, "latent_shape", model.event_shape))
    predicted, expected = (tf.nest.flatten(answer) for answer in (model.predict(x, batch_size=4, verbose=0), model(x)))
    for one, other in zip(predicted, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# --- Noise ---


@pytest.mark.parametrize("kind", DDE_KINDS)
def test_noise_is_standard_normal_and_scaled_by_the_level(kind):
    dde = make_dde(kind)
    x = points_for(dde, 4000)
    noisy_x, noise, noise_std = (tensor.numpy() for tensor in dde.add_noise(tf.constant(x), KEY))
    assert noise_std.shape == (len(x), 1)
    levels = noise_std.reshape(-1, *[1] * (x.ndim - 1))
    np.testing.assert_allclose(noisy_x, x + levels * noise, rtol=1e-5, atol=1e-5)
    for column in noise.reshape(len(x), -1).T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(noise.reshape(len(x), -1).T), np.eye(x[0].size), atol=0.08)
    if dde.noise_conditional:
        low, high = np.log(NOISE["range"])
        assert stats.kstest(np.log(noise_std[:, 0]), stats.uniform(low, high - low).cdf).pvalue > 1e-3
        # Stratified: one level in each of 4000 parts of the range.
        np.testing.assert_allclose(np.diff(np.sort(np.log(noise_std[:, 0]))), (high - low) / 4000, rtol=0.02)
        assert abs(stats.spearmanr(noise_std[:, 0], np.square(noise).reshape(len(x), -1).sum(1)).statistic) < 0.06
    else:
        np.testing.assert_allclose(levels, 0.4, rtol=1e-6)


def test_noise_is_a_function_of_the_key():
    ddes, x = [make_dde("range", seed=seed) for seed in range(3)], tf.constant(normal(50, 3))
    first, second, other = (dde.add_noise(x, key) for dde, key in zip(ddes, (KEY, KEY, OTHER_KEY), strict=True))
    assert_equal_arrays(first, second)
    for drawn, another in zip(first[1:], other[1:], strict=True):  # noise and levels
        assert not np.isin(drawn, another).any()
    drawn = [ddes[0].add_noise(x[:1], np.array([3, step])) for step in range(200)]
    norms, levels = zip(
        *((np.linalg.norm(noise), float(noise_std[0, 0])) for _, noise, noise_std in drawn), strict=True
    )
    assert abs(stats.spearmanr(norms, levels).statistic) < 0.3  # they do not come from the same bits


# --- Samples ---


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


def test_latents_and_points_may_have_any_shape_and_outputs_be_in_a_list():
    egm = make_egm("images", generator=identity_generator(4, 4, 1))
    assert egm.sample(3, seed=0).shape == egm.draw_latents(3, "latents", 0)[0].shape == (3, 4, 4, 1)
    z = keras.Input((2,))
    egm = make_egm(generator=keras.Model(z, [keras.layers.Dense(3)(z)]))  # as in a file of Keras 3.8
    assert egm.sample(3, seed=0).shape == (3, 3)


def test_latents_and_their_key_depend_on_seed_purpose_and_step():
    egm = make_egm()
    z, key = egm.draw_latents(20, "latents", 0)
    assert_equal_arrays((z, key), make_egm().draw_latents(20, "latents", 0))
    for model, purpose, step in ((make_egm(seed=1), "latents", 0), (egm, "generator", 0), (egm, "latents", 1)):
        other_z, other_key = model.draw_latents(20, purpose, step)
        assert not np.isin(z, other_z).any()
        assert not np.isin(key, other_key).any()


@pytest.mark.parametrize("average_decay", [0.0, 0.15])
def test_samples_come_from_a_moving_average_of_the_generator(average_decay):
    egm = make_egm(dde_steps=1, average_decay=average_decay)
    assert_equal_arrays(egm.averages, egm.generator.get_weights())
    egm.compile(SGD(0.0), SGD(1.0), run_eagerly=True)
    decays = []
    for _ in range(5):
        before = np.concatenate([average.numpy().ravel() for average in egm.averages])
        egm.train_on_batch(normal(8, 3))
        current = np.concatenate([weight.ravel() for weight in egm.generator.get_weights()])
        after = np.concatenate([average.numpy().ravel() for average in egm.averages])
        decays.append(np.dot(after - current, before - current) / np.sum((before - current) ** 2))
        np.testing.assert_allclose(after, current + decays[-1] * (before - current), atol=1e-6)
    assert np.all(np.diff(decays) > -1e-4)  # it grows to the value asked for
    np.testing.assert_allclose(decays[-1], average_decay, atol=1e-4)
    if average_decay > 0:
        assert decays[0] < 0.9 * average_decay
        assert differ(egm.generator.get_weights(), egm.averages)
    z, points = normal(5, 2), egm(normal(5, 2))
    egm.generator.set_weights([average.numpy() for average in egm.averages])
    np.testing.assert_array_equal(points, egm.generator(z))
