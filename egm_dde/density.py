"""DensityModel: what a network that is a log density gives, at one noise level or at a range of them."""

import math

import keras
import tensorflow as tf

from egm_dde import checks, draws
from egm_dde.training import Trainable


class DensityModel(Trainable):
    """A network ``net`` whose output is the log density of data with noise of the levels in ``noise_range``.

    Subclasses set ``net``, ``noise_std``, ``noise_range``, ``dual_weight``, ``seed`` and ``loss_tracker``.
    """

    def call(self, x, noise_std=None):
        """Evaluate the log density (batch, 1), up to a constant, and its gradient, the score (batch, *event).

        Args:
            x: points (batch, *event), in data units.
            noise_std: of a range of levels, the level (by keyword): a number or one a point (batch,); None is the
                lowest.
        """
        x = self.as_points(x)
        return self.differentiate(x, self.as_levels(x, noise_std))[:2]

    def log_density(self, x, noise_std=None):
        """Log density (batch, 1) of noisy data up to a constant, one for all levels by the dual term; see ``call``."""
        x = self.as_points(x)
        return self.apply_net(x, tf.math.log(self.as_levels(x, noise_std)))

    def score(self, x, noise_std=None):
        """Gradient (batch, *event) of the log density with respect to x; see ``call``."""
        return self.call(x, noise_std)[1]

    def denoise(self, noisy_x, noise_std=None):
        """Posterior mean (batch, *event) of the clean data, noisy_x + noise_std^2 * score(noisy_x); see ``call``.

        It is the formula of Miyasawa (1961) and Robbins (1956); ``noise_std`` is the noise in ``noisy_x``.
        """
        noisy_x = self.as_points(noisy_x)
        levels = self.as_levels(noisy_x, noise_std)
        return noisy_x + per_event(levels, noisy_x) ** 2 * self.differentiate(noisy_x, levels)[1]

    def add_noise(self, x, key):
        """Draw a noise level, log-uniform in the range, and noise for each of the clean points x (batch, *event).

        Returns:
            noisy_x (batch, *event), noise (batch, *event) in noise units, and noise_std (batch, 1).
        """
        noise_key, level_key = draws.split(key)
        noise = draws.normal(tf.shape(x), noise_key, x.dtype)
        low, high = (math.log(level) for level in self.noise_range)
        places = draws.stratified_uniform(tf.shape(x)[0], level_key, x.dtype)[:, None]
        noise_std = tf.exp(low + (high - low) * places)
        return x + per_event(noise_std, x) * noise, noise, noise_std

    def differentiate(self, x, noise_std, training=False):
        """Log density (batch, 1), its gradient (batch, *event), and its derivative (batch, 1) along log(noise_std)."""
        log_noise_std = tf.math.log(noise_std)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch((x, log_noise_std))
            log_density = self.apply_net(x, log_noise_std, training)
        return log_density, *tape.gradient(log_density, (x, log_noise_std))

    def apply_net(self, x, log_noise_std, training=False):
        """Output (batch, 1) of the network, in the type of the points."""
        log_density = self.net([x, log_noise_std] if self.noise_conditional else x, training=training)
        self.built = True  # training does not pass through __call__, which would set it
        checks.check_scalar_output(log_density.shape)
        return tf.cast(log_density, x.dtype)

    def as_levels(self, x, noise_std):
        """Noise levels (batch, 1), one a point; None is the lowest of the range."""
        noise_std = self.noise_range[0] if noise_std is None else noise_std
        checks.check_levels(noise_std, self.noise_range, x.shape[0])
        return tf.broadcast_to(tf.reshape(tf.cast(noise_std, x.dtype), (-1, 1)), (tf.shape(x)[0], 1))

    @property
    def noise_conditional(self):
        """Whether the network covers a range of noise levels."""
        return self.noise_range[0] < self.noise_range[1]

    @property
    def event_shape(self):
        """Shape of a point; None while the network does not know it."""
        shape = checks.input_shape(self.net)
        return None if shape is None else shape[1:]

    @property
    def num_steps(self):
        """Number of training steps made."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations)) if self.compiled else 0

    @property
    def metrics(self):
        return [self.loss_tracker]

    def compile(self, optimizer=None, **options):
        """Set the optimizer; None is ``Adam(1e-3)``. Other arguments as for ``keras.Model.compile``."""
        super().compile(keras.optimizers.Adam(1e-3) if optimizer is None else optimizer, **options)
        if self.built:  # only a built optimizer is saved with its slots
            is_trainable, self.trainable = self.trainable, True  # slots for all weights, so that files fit when thawed
            self.optimizer.build(self.trainable_variables)
            self.trainable = is_trainable

    def get_config(self):
        options = {name: getattr(self, name) for name in ("noise_std", "dual_weight", "seed")}
        return {**super().get_config(), "net": keras.saving.serialize_keras_object(self.net), **options}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "net": keras.saving.deserialize_keras_object(config["net"])})


def per_event(values, x):
    """Reshape values (batch, 1) so that they broadcast against x (batch, *event)."""
    return tf.reshape(values, (-1,) + (1,) * (x.shape.rank - 1))
