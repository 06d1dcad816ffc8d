import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from small_models import normal

from egm_dde import targets


def average_over_sources(x, noisy_x, noise_std):
    """Average the noise of points on a line, and its square; all arguments (n,)."""
    noise = (noisy_x - x) / noise_std
    columns = (tf.constant(column[:, None]) for column in (x, noisy_x, noise, noise_std))
    mean_noise, square, mean_square = targets.average_over_sources(*columns)
    np.testing.assert_allclose(square[:, 0], noise**2)
    return mean_noise.numpy()[:, 0], mean_square.numpy()[:, 0]


def test_averaging_over_sources_leaves_the_expected_gradient_as_it_is(monkeypatch):
    # For four fixed points, integrate over the noise of each by quadrature: noise and squared noise, which the
    # network's derivatives meet, may be averaged over the sources under any function of the noisy point.
    x, noise_std, y = np.array([0.0, 0.3, 0.5, 2.0]), 0.4, np.linspace(-4, 6, 4001)
    monkeypatch.setattr(targets, "SOURCES_PER_BLOCK", len(x))
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
    x = np.array([-300, -300 + 1e-4, 300, 300.5], dtype)[:, None]
    noise = np.array([0.5, -1.0, 2.0, 0.1], dtype)[:, None]
    noise_std = np.full((4, 1), 1e-3, dtype)
    mean_noise, _, mean_square = targets.average_over_sources(
        *map(tf.constant, (x, x + noise_std * noise, noise, noise_std))
    )
    np.testing.assert_allclose(mean_noise[2:], noise[2:], atol=1e-3)
    np.testing.assert_allclose(mean_square[2:], noise[2:] ** 2, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0.0, 512.0])
def test_averages_depend_on_differences_of_points_alone(offset, dtype):
    # Multiples of 1/4 up to 512 and noise of 1/2 are exact in float32, near 0 in bfloat16, too.
    rng = np.random.default_rng(0)
    x, noise = rng.integers(-8, 8, (2, 50, 2)) / 4.0
    columns = (x, x + 0.5 * noise, noise, np.full((50, 1), 0.5))
    expected = targets.average_over_sources(*(tf.constant(column, tf.float64) for column in columns))
    if offset and dtype == "bfloat16":
        pytest.skip("these points are not exact")
    columns = (x + offset, x + offset + 0.5 * noise, *columns[2:])
    given = targets.average_over_sources(*(tf.cast(column, dtype) for column in columns))
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(
            tf.cast(one, tf.float64), other, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-5
        )


@pytest.mark.parametrize("scale", [1.0, 1e10])
def test_the_last_block_is_not_filled_with_points(scale, monkeypatch):
    # Two blocks of four and one of a single point, whose only source it is itself.
    monkeypatch.setattr(targets, "SOURCES_PER_BLOCK", 4)
    x = scale * normal(9, 1)[:, 0]
    noise = normal(9, 1, seed=1)[:, 0]
    mean_noise, mean_square = average_over_sources(x, x + scale * noise, np.full(9, scale, np.float32))
    np.testing.assert_allclose(mean_noise[8], noise[8], rtol=1e-3)
    np.testing.assert_allclose(mean_square[8], noise[8] ** 2, rtol=1e-2)
    assert abs(mean_noise[:8] - noise[:8]).min() > 1e-3


def test_the_expected_square_meets_the_mean_target_and_keeps_its_expectation():
    estimate, probabilities = tf.constant([0.7, -2.0]), [0.2, 0.3, 0.5]
    possible_targets = np.array([[1.0, 2.0], [-1.0, 0.5], [0.3, -4.0]], np.float32)
    mean_target = np.average(possible_targets, axis=0, weights=probabilities).astype(np.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(estimate)
        squares = [targets.expected_square(estimate, target, mean_target) for target in possible_targets]
    for square in squares:
        np.testing.assert_allclose(tape.gradient(square, estimate), 2 * (estimate - mean_target), rtol=1e-6)
    expected = np.average((estimate - possible_targets) ** 2, axis=0, weights=probabilities)
    np.testing.assert_allclose(np.average(squares, axis=0, weights=probabilities), expected, rtol=1e-6)
