"""Training targets with less scatter: averages over all points that a noisy point may have come from."""

import math

import numpy as np
import tensorflow as tf

SOURCES_PER_BLOCK = 512  # each noisy point meets the points of its block of the batch, this many at most


def average_over_sources(x, noisy_x, noise, noise_std):
    """Average the noise over the points of its block that a noisy point may have come from, not its own alone.

    Seen from y = noisy_x_i, point x_j is the source with probability w_ij, proportional to
    exp(-||y - x_j||^2 / (2 noise_std_i^2)), and the noise was (y - x_j) / noise_std_i. It is attention over the batch:
    two matrix products and a softmax.

    Averaging changes no expected gradient: given the batch and y, the point that was moved is x_j with probability w_j.
    (For a fixed y, a mean over a random batch is a biased estimate of the score; see arXiv:2302.00670.)

    ``x`` are clean points (batch, *event), ``noise_std`` levels (batch, 1) in data units, ``noise`` is in noise units,
    and ``noisy_x`` is x + noise_std * noise. Returns the average of the noise (batch, *event), its squared norm
    (batch, 1), and the average of that (batch, 1).
    """
    batch_size, dim = tf.shape(x)[0], math.prod(x.shape[1:])
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32  # half precision is too coarse for exponents
    flat_x, y, flat_noise = (tf.cast(tf.reshape(points, (-1, dim)), dtype) for points in (x, noisy_x, noise))
    centre = tf.reduce_mean(flat_x, axis=0)
    flat_x, y = flat_x - centre, y - centre  # the smaller the numbers, the smaller the rounding errors
    precision = tf.cast(noise_std, dtype) ** -2.0
    squared_norm = tf.reduce_sum(tf.square(flat_noise), axis=-1, keepdims=True)
    squared_y = tf.reduce_sum(tf.square(y), axis=-1, keepdims=True)
    # Up to a term that x_j does not enter, the exponent is a product: (y x_j - ||x_j||^2 / 2) / noise_std^2.
    sources = tf.concat([flat_x, tf.reduce_sum(tf.square(flat_x), axis=-1, keepdims=True)], axis=-1)
    queries = precision * tf.concat([y, tf.fill([batch_size, 1], tf.constant(-0.5, dtype))], axis=-1)
    # Blocks of points bound the memory. The last one is filled up with sources at infinity, whose weight is exactly 0.
    block_size = tf.minimum(batch_size, SOURCES_PER_BLOCK)
    filling = [[0, -batch_size % block_size], [0, 0]]
    infinity = tf.fill([filling[0][1], 1], tf.constant(np.inf, dtype))
    places = tf.concat([sources, tf.pad(infinity, [[0, 0], [dim, 0]])], axis=0)
    queries = tf.pad(queries, filling, constant_values=-0.5)
    places, queries, sources = (
        tf.reshape(rows, (-1, block_size, dim + 1)) for rows in (places, queries, tf.pad(sources, filling))
    )
    weights = tf.nn.softmax(tf.matmul(queries, places, transpose_b=True))  # (blocks, block_size, block_size)
    means = tf.reshape(tf.matmul(weights, sources), (-1, dim + 1))[:batch_size]
    mean_x, mean_squared_x = means[:, :dim], means[:, dim:]
    mean_noise = tf.sqrt(precision) * (y - mean_x)
    mean_squared_norm = precision * (squared_y - 2.0 * tf.reduce_sum(y * mean_x, -1, keepdims=True) + mean_squared_x)
    # Where rounding would move an exponent noticeably, the own noise stays.
    is_exact = np.finfo(dtype.as_numpy_dtype).eps * precision * squared_y < 0.1
    mean_noise = tf.reshape(tf.where(is_exact, mean_noise, flat_noise), tf.shape(x))
    mean_squared_norm = tf.where(is_exact, mean_squared_norm, squared_norm)
    return tuple(tf.cast(result, x.dtype) for result in (mean_noise, squared_norm, mean_squared_norm))


def expected_square(estimate, target, mean_target):
    """Square (estimate - target)^2 that scatters less: the estimate meets the mean of the targets it may have had.

    (estimate - mean)^2 + target^2 - mean^2 differs from it by 2 estimate (target - mean), which is zero on average: the
    loss keeps its expectation and its minimum, and its gradient sees ``mean_target`` alone.
    """
    return tf.square(estimate - mean_target) + tf.square(target) - tf.square(mean_target)
