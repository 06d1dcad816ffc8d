"""Training targets with less scatter: averages over all points that a noisy point may have come from."""

import math

import numpy as np
import tensorflow as tf

POINTS_PER_BLOCK = 512  # bounds the memory: more moved points are met in blocks, with the sources dealt out to them


def average_over_sources(x, noisy_x, noise, noise_std):
    """Average the noise over the points that a noisy point may have come from, not its own alone.

    Seen from y = noisy_x_i, point x_j is the source with probability w_ij, proportional to
    exp(-||y - x_j||^2 / (2 noise_std_i^2)), and the noise was (y - x_j) / noise_std_i. It is attention over the batch:
    two matrix products and a softmax.

    Averaging changes no expected gradient: given the batch and y, the point that was moved is x_j with probability w_j.
    (For a fixed y, a mean over a random batch is a biased estimate of the score; see arXiv:2302.00670.)

    ``x`` are clean points (batch, *event), of which all are sources and the first ``moved`` were moved: ``noisy_x`` is
    x[:moved] + noise_std * noise, ``noise_std`` are levels (moved, 1) in data units, and ``noise`` is in noise units.
    Returns the average of the noise (moved, *event), its squared norm (moved, 1), and the average of that (moved, 1).
    """
    num_moved, dim = tf.shape(noise)[0], math.prod(x.shape[1:])
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32  # half precision is too coarse for exponents
    flat_x, y, flat_noise = (tf.cast(tf.reshape(points, (-1, dim)), dtype) for points in (x, noisy_x, noise))
    centre = tf.reduce_mean(flat_x, axis=0)
    flat_x, y = flat_x - centre, y - centre  # the smaller the numbers, the smaller the rounding errors
    precision = tf.cast(noise_std, dtype) ** -2.0
    squared_norm = tf.reduce_sum(tf.square(flat_noise), axis=-1, keepdims=True)
    squared_y = tf.reduce_sum(tf.square(y), axis=-1, keepdims=True)
    # Up to a term that x_j does not enter, the exponent is a product: (y x_j - ||x_j||^2 / 2) / noise_std^2.
    sources = tf.concat([flat_x, tf.reduce_sum(tf.square(flat_x), axis=-1, keepdims=True)], axis=-1)
    queries = precision * tf.concat([y, tf.fill([num_moved, 1], tf.constant(-0.5, dtype))], axis=-1)
    num_blocks = tf.maximum(-(-num_moved // POINTS_PER_BLOCK), 1)

    def in_blocks(rows, filler=0.0):
        """Rows (n, d + 1) as (blocks, rows a block, d + 1); those that fill up the last block end in ``filler``."""
        filling = tf.pad(tf.fill([-tf.shape(rows)[0] % num_blocks, 1], tf.constant(filler, dtype)), [[0, 0], [dim, 0]])
        return tf.reshape(tf.concat([rows, filling], axis=0), (num_blocks, -1, dim + 1))

    def with_others(filler):
        """Sources of each block: those that were moved there, and their share of the others."""
        return tf.concat([in_blocks(part, filler) for part in (sources[:num_moved], sources[num_moved:])], axis=1)

    # A source that fills up is infinitely far, so its weight is exactly 0.
    weights = tf.nn.softmax(tf.matmul(in_blocks(queries, -0.5), with_others(np.inf), transpose_b=True))
    means = tf.reshape(tf.matmul(weights, with_others(0.0)), (-1, dim + 1))[:num_moved]
    mean_x, mean_squared_x = means[:, :dim], means[:, dim:]
    mean_noise = tf.sqrt(precision) * (y - mean_x)
    mean_squared_norm = precision * (squared_y - 2.0 * tf.reduce_sum(y * mean_x, -1, keepdims=True) + mean_squared_x)
    # Where rounding would move an exponent noticeably, the own noise stays.
    is_exact = np.finfo(dtype.as_numpy_dtype).eps * precision * squared_y < 0.1
    mean_noise = tf.reshape(tf.where(is_exact, mean_noise, flat_noise), tf.shape(noise))
    mean_squared_norm = tf.where(is_exact, mean_squared_norm, squared_norm)
    return tuple(tf.cast(result, x.dtype) for result in (mean_noise, squared_norm, mean_squared_norm))


def expected_square(estimate, target, mean_target):
    """Square (estimate - target)^2 that scatters less: the estimate meets the mean of the targets it may have had.

    (estimate - mean)^2 + target^2 - mean^2 differs from it by 2 estimate (target - mean), which is zero on average: the
    loss keeps its expectation and its minimum, and its gradient sees ``mean_target`` alone.
    """
    return tf.square(estimate - mean_target) + tf.square(target) - tf.square(mean_target)
