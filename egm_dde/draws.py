"""Random draws that depend on seed, purpose and step alone, so that a resumed run draws the same numbers."""

import tensorflow as tf

PURPOSES = ("train", "evaluate", "generator", "latents", "sample", "langevin", "annealed_langevin", "partition")


def draw_key(seed, purpose, step):
    """Make the key of one draw.

    Args:
        seed: integer from 0 to 2**31 - 1.
        purpose: one of ``PURPOSES``.
        step: integer or scalar integer tensor.

    Returns:
        int64 tensor (2,), to be used once, by ``split``, ``normal`` or ``uniform``. The replicas of a
        ``tf.distribute`` strategy get a key each.
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
