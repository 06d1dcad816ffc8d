import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from small_models import (
    DDE_KINDS,
    KEY,
    NOISE,
    OTHER_KEY,
    assert_equal_arrays,
    central_differences,
    double_precision,
    make_dde,
    normal,
    points_for,
)

from energy_models import DDE


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
    for other in (x.astype(np.float64), tf.constant(x), tf.constant(x, tf.float64)):
        for method in (dde.log_density, dde.score, dde.denoise):
            np.testing.assert_array_equal(method(other, noise_std=0.5), method(x, noise_std=0.5))
        assert_equal_arrays(dde(other), dde(x))


@pytest.mark.parametrize("kind", ["fixed", "images"])
def test_dde_predicts_in_batches(kind):
    dde = make_dde(kind)
    x = points_for(dde, 10)
    for predicted, expected in zip(dde.predict(x, batch_size=4, verbose=0), dde(x), strict=True):
        np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("kind", ["fixed", "range"])
def test_noise_is_a_function_of_the_key(kind):
    x = tf.constant(normal(50, 3))
    first, second, other = (
        make_dde(kind, seed=seed).add_noise(x, key) for seed, key in enumerate((KEY, KEY, OTHER_KEY))
    )
    assert_equal_arrays(first, second)
    assert not np.isin(first[1], other[1]).any()
    if kind == "range":
        assert not np.isin(first[2], other[2]).any()


def test_network_without_an_input_is_built_by_training(tmp_path):
    net = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(1, use_bias=False)])
    dde = DDE(net, 0.5, seed=0)
    dde.compile(run_eagerly=True)
    dde.fit(normal(64, 2), batch_size=32, epochs=1, verbose=0)
    assert dde.num_steps == 2
    dde.save(tmp_path / "dde.keras")
    loaded = keras.saving.load_model(tmp_path / "dde.keras")
    x = normal(5, 2, seed=1)
    np.testing.assert_array_equal(loaded.log_density(x), dde.log_density(x))
