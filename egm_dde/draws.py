"""Random draws that depend on seed, purpose and step alone, so that a resumed run draws the same numbers."""

import math

import tensorflow as tf

PURPOSES = ("train", "evaluate", "generator", "latents", "sample", "langevin", "annealed_langevin", "partition")


def draw_key(seed, purpose, step):
    """Make the key of one draw: an int64 tensor (2,), to be used once, by ``split``, ``normal`` or ``uniform``.

    ``seed`` is an integer from 0 to 2**31 - 1, ``purpose`` one of ``PURPOSES``, and ``step`` an integer or a scalar
    integer tensor. The replicas of a ``tf.distribute`` strategy get a key each.
    """
    key = tf.stack([tf.cast(seed, tf.int64), tf.constant(PURPOSES.index(purpose), tf.int64)])
    key = tf.random.fold_in(key, tf.cast(step, tf.int64), alg="philox")
    replica = tf.distribute.get_replica_context()
    if replica is not None and replica.num_replicas_in_sync > 1:
        key = tf.random.fold_in(key, tf.cast(replica.replica_id_in_sync_group, tf.int64), alg="philox")
    return key


def split(key):
    """Split a key into two independent ones."""
    return tf.unstack(tf.random.split(key, 2, alg="philox"))


def normal(shape, key, dtype=tf.float32):
    """Draw standard normal numbers."""
    return tf.random.stateless_normal(shape, key, dtype=dtype, alg="philox")


def uniform(shape, key, dtype=tf.float32):
    """Draw numbers that are uniform in [0, 1)."""
    return tf.random.stateless_uniform(shape, key, dtype=dtype, alg="philox")


def stratified_uniform(num, key, dtype=tf.float32):
    """Draw ``num`` numbers uniform in [0, 1), one in each of ``num`` equal parts, shifted around by one random number.

    Each number alone is uniform; together they fill the interval evenly.
    """
    shift = uniform([], key, dtype)
    return tf.math.floormod(tf.range(num, dtype=dtype) / tf.cast(num, dtype) + shift, 1.0)


def spread_latents(n_samples, dim, key, dtype=tf.float32):
    """Draw standard normal latents (n_samples, dim) that fill their space more evenly than independent ones.

    Each latent is standard normal by itself, but each part of the plane of two coordinates gets nearly its right share
    of a batch, and so do the modes of a generator. The points (i sqrt(2), i sqrt(3)) mod 1 (Richtmyer 1951) are shifted
    by a random vector modulo 1 (Cranley and Patterson 1976) and become two normal coordinates by radius and angle (Box
    and Muller 1958). Each pair of coordinates has a shift and a random order of its own.
    """
    order_key, shift_key = split(key)
    num_pairs = (dim + 1) // 2
    order = tf.argsort(uniform([num_pairs, n_samples], order_key))
    shifts = uniform([2, num_pairs, 1], shift_key, tf.float64)
    places = [tf.cast(order, tf.float64) * math.sqrt(prime) + shifts[i] for i, prime in enumerate((2, 3))]
    fractions = [tf.cast(place - tf.floor(place), tf.float32) for place in places]  # each (num_pairs, n_samples)
    radius = tf.sqrt(-2.0 * tf.math.log(tf.maximum(fractions[0], 1e-9)))  # 0 would be infinitely far
    angle = 2.0 * math.pi * fractions[1]
    pairs = tf.stack([radius * tf.cos(angle), radius * tf.sin(angle)], axis=-1)  # (num_pairs, n_samples, 2)
    return tf.cast(tf.reshape(tf.transpose(pairs, (1, 0, 2)), (n_samples, 2 * num_pairs))[:, :dim], dtype)


def per_event(values, x):
    """Reshape values (batch, 1), such as noise levels, so that they broadcast against points x (batch, *event)."""
    return tf.reshape(values, (-1,) + (1,) * (x.shape.rank - 1))
