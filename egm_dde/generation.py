"""GeneratorModel: what a generator gives while two densities train it: latents, samples, a moving average."""

import math

import keras
import numpy as np
import tensorflow as tf

from egm_dde import checks, draws
from egm_dde.targets import spread_latents
from egm_dde.training import Trainable

SAMPLES_PER_CHUNK = 2**16  # bounds the memory of sample


class GeneratorModel(Trainable):
    """A ``generator`` between ``dde_real`` and ``dde_fake``, and ``average_generator``, which samples are drawn from.

    Subclasses set these, the ``options`` below and ``gen_loss_tracker``.
    """

    parts = ("dde_real", "dde_fake", "generator")
    options = ("dde_steps", "real_steps", "latents_per_point", "average_decay", "level_power", "seed")

    def call(self, z):
        return tf.cast(self.average_generator(z), self.variable_dtype)

    def sample(self, n_samples, seed=None):
        """Generate points, a NumPy array (n_samples, *event) in data units, by one pass of the generator.

        They have no added noise. An integer ``seed`` makes latents repeatable; None draws fresh ones.
        """
        checks.check_integer("n_samples", n_samples)
        seed = checks.check_seed(seed)
        chunks = []
        for start in range(0, n_samples, SAMPLES_PER_CHUNK):
            shape = (min(SAMPLES_PER_CHUNK, n_samples - start), *self.latent_shape)
            z = draws.normal(shape, draws.draw_key(seed, "sample", start), self.variable_dtype)
            chunks.append(self(z).numpy())
        return np.concatenate(chunks)

    def generate(self, z, training=False):
        """Map latents (batch, *latent) to points (batch, *event) by the generator that is trained."""
        return tf.cast(self.generator(z, training=training), self.variable_dtype)

    def draw_latents(self, n_samples, purpose, step):
        """Draw latents (n_samples, *latent), evenly spread, and a key for the noise that goes with them."""
        latent_key, noise_key = draws.split(draws.draw_key(self.seed, purpose, step))
        z = spread_latents(n_samples, math.prod(self.latent_shape), latent_key, self.variable_dtype)
        return tf.reshape(z, (n_samples, *self.latent_shape)), noise_key

    def average_weights(self):
        """Move the weights of the average towards the generator's: slowly, but fast in the first steps."""
        num_steps = tf.cast(self.optimizer.iterations, tf.float32)
        decay = tf.minimum(self.average_decay, num_steps / (num_steps + 10.0))
        for average, variable in zip(self.average_generator.weights, self.generator.weights, strict=True):
            average.assign(variable + tf.cast(decay, variable.dtype) * (average - variable))

    def as_subgraph(self, step):
        """``step`` as a graph of its own, where TensorFlow can: traced once for all its calls, and a tenth faster."""
        return step if tf.executing_eagerly() or tf.distribute.has_strategy() else tf.function(step, autograph=False)

    @property
    def latent_shape(self):
        """Shape of a latent."""
        return checks.input_shape(self.generator)[1:]

    @property
    def event_shape(self):
        """Shape of a point."""
        return self.dde_real.event_shape

    @property
    def noise_range(self):
        """The lowest and the highest noise level."""
        return self.dde_real.noise_range

    @property
    def num_steps(self):
        """Number of training steps made."""
        return self.dde_fake.num_steps // self.dde_steps if self.compiled else 0  # the last network to be updated

    @property
    def metrics(self):
        return [self.dde_real.loss_tracker, self.dde_fake.loss_tracker, self.gen_loss_tracker]

    def get_metrics_result(self):
        """Means of the losses, under the names in the logs."""
        names = ("loss_dde_real", "loss_dde_fake", "gen_loss")
        return {name: metric.result() for name, metric in zip(names, self.metrics, strict=True)}

    def get_compile_config(self):
        if not self.compiled:
            return None
        optimized = {"dde_optimizer": self.dde_fake, "gen_optimizer": self, "real_optimizer": self.dde_real}
        optimizers = {name: keras.saving.serialize_keras_object(part.optimizer) for name, part in optimized.items()}
        return {**optimizers, **self.compile_options}

    def get_config(self):
        parts = {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in self.parts}
        return {**super().get_config(), **parts, **{name: getattr(self, name) for name in self.options}}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, **{name: keras.saving.deserialize_keras_object(config[name]) for name in cls.parts}})


def copy_network(net):
    """A network of the same architecture and weights, with variables of its own."""
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(net))
    if not copy.built:
        copy.build(checks.input_shape(net))
    copy.set_weights(net.get_weights())
    return copy
