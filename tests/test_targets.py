import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from small_models import normal

from egm_dde import targets


def average(x, noise, noise_std, dtype):
    """Average the noise of points (n, d) and its square (n, 1); the levels are (n, 1)."""
    arrays = (tf.cast(each, dtype) for each in (x, x[: len(noise)] + noise_std * noise, noise, noise_std))
    mean_noise, square, mean_square = targets.average_over_sources(*arrays)
    assert mean_noise.dtype == square.dtype == mean_square.dtype == dtype
    mean_noise, square, mean_square = (tf.cast(each, tf.float64) for each in (mean_noise, square, mean_square))
    np.testing.assert_allclose(square[:, 0], np.sum(noise**2, axis=1), rtol=1e-2 if dtype == "bfloat16" else 1e-5)
    return mean_noise, mean_square


def average_by_bayes_rule(x, noise, noise_std, block_size):
    """The same, from the probabilities of all sources within a block."""
    results = []
    for i, y in enumerate(x[: len(noise)] + noise_std * noise):
        candidates = (y - x[i - i % block_size :][:block_size]) / noise_std[i]
        probabilities = stats.norm.pdf(candidates).prod(axis=1)
        weights = probabilities / probabilities.sum()
        results.append((weights @ candidates, weights @ np.square(candidates).sum(axis=1, keepdims=True)))
    return map(np.array, zip(*results, strict=True))


@pytest.mark.parametrize(
    ("dtype", "offset", "scale"),
    [("float64", 0.0, 1.0), ("float64", 0.0, 1e10), ("float32", 512.0, 1.0), ("bfloat16", 0.0, 1.0)],
)
@pytest.mark.parametrize("block_size", [4, 64])
def test_averages_are_those_of_bayes_rule(dtype, offset, scale, block_size, monkeypatch):
    # The last of the smaller blocks has one point, whose only source it is itself. Multiples of 1/4 up to 512 are exact
    # in float32, those near 0 in bfloat16, too.
    monkeypatch.setattr(targets, "POINTS_PER_BLOCK", block_size)
    rng = np.random.default_rng(0)
    x, noise = rng.integers(-8, 8, (2, 49, 2)) / 4.0
    noise_std = np.resize([0.5, 1.0, 2.0], (49, 1))
    expected = average_by_bayes_rule(x, noise, noise_std, block_size)
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
    for given, exact in zip(average(offset + scale * x, noise, scale * noise_std, dtype), expected, strict=True):
        np.testing.assert_allclose(given, exact, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(("block_size", "dealt_out"), [(64, [range(49)]), (8, [range(7), range(7, 14), range(14, 20)])])
def test_points_that_stay_are_sources_too(block_size, dealt_out, monkeypatch):
    # Of 49 points, 20 are moved. The others belong to all of them, or are dealt out to their blocks, 10, 10 and 9.
    monkeypatch.setattr(targets, "POINTS_PER_BLOCK", block_size)
    x, noise, noise_std = normal(49, 2), normal(20, 2, seed=1), np.resize([0.5, 1.0, 2.0], (20, 1))
    given = average(x, noise, noise_std, "float64")
    for i, moved in enumerate(dealt_out):
        sources = x if len(dealt_out) == 1 else np.concatenate([x[moved], x[20 + 10 * i : 30 + 10 * i]])
        its = slice(moved.start, min(moved.stop, 20))
        expected = average_by_bayes_rule(sources, noise[its], noise_std[its], 64)
        for results, exact in zip(given, expected, strict=True):
            np.testing.assert_allclose(results[its], exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_averages_keep_their_meaning_where_rounding_would_swamp_them(dtype):
    # Two far points and noise so small that their squared distances, as exponents, are beyond the digits of float32.
    x, noise = np.array([[-300], [-300 + 1e-4], [300], [300.5]]), np.array([[0.5], [-1.0], [2.0], [0.1]])
    mean_noise, mean_square = average(x, noise, np.full((4, 1), 1e-3), dtype)
    np.testing.assert_allclose(mean_noise[2:], noise[2:], atol=1e-3)
    np.testing.assert_allclose(mean_square[2:], noise[2:] ** 2, atol=1e-3)


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
