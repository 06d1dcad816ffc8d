"""Training targets with less scatter: averages over all points that a noisy point may have come from, even latents."""

import math

import numpy as np
import tensorflow as tf

from egm_dde import draws

SOURCES_PER_BLOCK = 512  # each noisy point meets the points of its block of the batch, this many at most


def average_over_sources(x, noisy_x, noise, noise_std):
    """Average the noise over the points of its block that a noisy point may have come from, not its own alone.

    Seen from y = noisy_x_i, point x_j is the source with probability w_ij, proportional to
    exp(-||y - x_j||^2 / (2 noise_std_i^2)), and the noise was (y - x_j) / noise_std_i. It is attention over the batch:
    two matrix products and a softmax.

    Averaging changes no expected gradient: given the batch and y, the point that was moved is x_j with probability w_j.
    (For a fixed y, a mean over a random batch is a biased estimate of the score; see arXiv:2302.00670.)

    Args:
        x: clean points (batch, *event), as are the shapes of ``noisy_x`` and ``noise``.
        noisy_x: x + noise_std * noise.
        noise: in noise units.
        noise_std: levels (batch, 1), in data units.

    Returns:
        mean_noise (batch, *event), the squared norm (batch, 1) of ``noise``, and its average (batch, 1).
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
    # Blocks of points bound the memory; the last one is filled up with sources that are infinitely far away.
    block_size = tf.minimum(batch_size, SOURCES_PER_BLOCK)
    num_filled = -batch_size % block_size
    infinitely_far = tf.one_hot(tf.fill([num_filled], dim), dim + 1, on_value=math.sqrt(dtype.max), dtype=dtype)
    sources = tf.reshape(tf.concat([sources, infinitely_far], axis=0), (-1, block_size, dim + 1))
    queries = tf.reshape(tf.pad(queries, [[0, num_filled], [0, 0]]), (-1, block_size, dim + 1))
    weights = tf.nn.softmax(tf.matmul(queries, sources, transpose_b=True))  # (blocks, block_size, block_size)
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


def spread_latents(n_samples, dim, key, dtype=tf.float32):
    """Draw standard normal latents (n_samples, dim) that fill their space more evenly than independent ones.

    Each latent is standard normal by itself, but each part of the plane of two coordinates gets nearly its right share
    of a batch, and so do the modes of a generator. The points (i sqrt(2), i sqrt(3)) mod 1 (Richtmyer 1951) are shifted
    by a random vector modulo 1 (Cranley and Patterson 1976) and become two normal coordinates by radius and angle (Box
    and Muller 1958). Each pair of coordinates has a shift and a random order of its own.
    """
    order_key, shift_key = draws.split(key)
    num_pairs = (dim + 1) // 2
    order = tf.argsort(draws.uniform([num_pairs, n_samples], order_key))
    shifts = draws.uniform([2, num_pairs, 1], shift_key, tf.float64)
    places = [tf.cast(order, tf.float64) * math.sqrt(prime) + shifts[i] for i, prime in enumerate((2, 3))]
    fractions = [tf.cast(place - tf.floor(place), tf.float32) for place in places]  # each (num_pairs, n_samples)
    radius = tf.sqrt(-2.0 * tf.math.log(tf.maximum(fractions[0], 1e-9)))  # 0 would be infinitely far
    angle = 2.0 * math.pi * fractions[1]
    pairs = tf.stack([radius * tf.cos(angle), radius * tf.sin(angle)], axis=-1)  # (num_pairs, n_samples, 2)
    return tf.cast(tf.reshape(tf.transpose(pairs, (1, 0, 2)), (n_samples, 2 * num_pairs))[:, :dim], dtype)
