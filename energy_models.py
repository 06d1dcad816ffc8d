"""The method: denoising density estimators (DDE) and a generator that descends between two of them (EGM).

Three functions are the method (arXiv:2001.02728); they are methods of the two classes below. Read them first:

* ``denoising_loss`` of a DDE: Eq. 5, and the dual term that ties the noise levels together (arXiv:2506.05310).
* ``generator_loss`` of an EGM: Eq. 8, the KL divergence that the generator descends.
* ``train_step`` of an EGM: one step of the generator, then some of each DDE.

One sign convention throughout: a network outputs a **log density** up to a constant (the energy is its negative), the
gradient of the log density with respect to the point is the **score**, and at ``x + noise_std * noise`` with standard
normal ``noise`` the regression target of the score is ``-noise / noise_std``.
"""

import math

from egm_dde.runtime import require_tensorflow

require_tensorflow()  # before Keras is imported, which chooses its backend then

import keras
import numpy as np
import tensorflow as tf

from egm_dde import checks, draws, sampling
from egm_dde.draws import per_event
from egm_dde.image_networks import build_image_energy_net, build_image_generator
from egm_dde.networks import build_energy_net, build_generator
from egm_dde.targets import average_over_sources, expected_square
from egm_dde.training import Trainable, separate_optimizers

__all__ = ["DDE", "EGM", "build_energy_net", "build_generator", "build_image_energy_net", "build_image_generator"]

SAMPLES_PER_CHUNK = 2**16  # bounds the memory of sample


def denoising_loss(dde, x, key, training=False):
    """The training loss of a DDE on clean points x (batch, *event), in noise units; ``key`` is that of the noise."""
    noisy_x, noise, noise_std = dde.add_noise(x[: dde.count_moved(x)] if training else x, key)
    # The noise is one guess at where a noisy point came from. The network meets the mean of all guesses.
    mean_noise, squared_norm, mean_squared_norm = dde.average_over_sources(x, noisy_x, noise, noise_std)
    _, score, level_slope = dde.differentiate(noisy_x, noise_std, training)

    # Eq. 5: noise_std * score is to predict minus the noise.
    loss = tf.reduce_mean(expected_square(per_event(noise_std, x) * score, -noise, -mean_noise))
    if dde.noise_conditional and dde.dual_weight > 0:
        # Dual term: the derivative along log(noise_std) is to predict ||noise||^2 - d.
        dim = math.prod(x.shape[1:])
        squares = expected_square(level_slope, squared_norm - dim, mean_squared_norm - dim)  # (batch, 1)
        loss += dde.dual_weight * tf.reduce_mean(squares) / (2 * dim)
    return loss


def generator_loss(egm, z, key, training=False):
    """KL(q~ || p~) up to a constant, in nats, at latents z (batch, *latent); ``key`` is that of the noise."""
    noisy_y, _, noise_std = egm.dde_fake.add_noise(egm.generate(z, training), key)
    log_ratio = egm.dde_fake.log_density(noisy_y, noise_std) - egm.dde_real.log_density(noisy_y, noise_std)
    weights = noise_std**egm.level_power
    return tf.reduce_mean(weights * log_ratio) / tf.reduce_mean(weights)


def train_step(egm, data):
    """One training step of an EGM on a batch of clean points; returns the means of its losses."""
    x = egm.read_batch(data)
    num_points = egm.dde_real.count_moved(x)

    # One step of the generator. Its gradient is the noisiest of the three, so it uses more latents than points ...
    z, key = egm.draw_latents(egm.latents_per_point * num_points, "generator", egm.step)
    gen_loss = egm.descend(egm.optimizer, egm.generator, lambda: egm.generator_loss(z, key, training=True), "gen_loss")
    egm.gen_loss_tracker.update_state(gen_loss, sample_weight=num_points)
    egm.update_averages()

    # ... then some of each DDE, with fresh noise in each, and fresh generated points.
    step_real, step_fake = (egm.as_subgraph(dde.train_step) for dde in (egm.dde_real, egm.dde_fake))
    if egm.dde_real.trainable_variables:
        for i in range(egm.real_steps):
            step_real(tf.roll(x, -i * num_points, axis=0))  # moves other points each time, if not all
    else:
        egm.dde_real.test_step(x)  # it is frozen, and measured
    for _ in range(egm.dde_steps):
        z, _ = egm.draw_latents(egm.dde_fake.sources_per_point * num_points, "latents", egm.dde_fake.step)
        step_fake(egm.generate(z, training=True))
    return egm.finish_step()


@keras.saving.register_keras_serializable("egm_dde")
class DDE(Trainable):
    """Denoising density estimator: a scalar network whose output is the log density of the noisy data.

    For data x and y = x + noise_std * noise, noise ~ N(0, I), it minimises (Eq. 5, in noise units)

        E ||noise_std * grad_y f(y) + noise||^2 / d,

    whose minimiser is f = log p~ + constant, with p~ = p * N(0, noise_std^2 I) the density of y. A loss of 1 means
    "learned nothing"; the unavoidable part is 1 - noise_std^2 * J / d, with J = E ||grad log p~||^2 the Fisher
    information of p~. With a range of levels, the derivative along the level is fitted too, by the dual term

        E (d f(y, noise_std) / d log(noise_std) - (||noise||^2 - d))^2 / (2 d),

    which ties all levels to one constant and so gets the relative mass of far modes right. It is 1 at first as well.
    """

    denoising_loss = denoising_loss
    average_over_sources = staticmethod(average_over_sources)

    def train_step(self, data):
        x = self.read_batch(data)
        key = draws.draw_key(self.seed, "train", self.step)
        loss = self.descend(self.optimizer, self, lambda: self.denoising_loss(x, key, training=True))
        self.loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return self.finish_step()

    def test_step(self, data):
        x = self.read_batch(data)
        # Keyed by the points seen since the metrics were reset: each evaluation meets the same noise.
        key = draws.draw_key(self.seed, "evaluate", self.loss_tracker.count)
        self.loss_tracker.update_state(self.denoising_loss(x, key), sample_weight=tf.shape(x)[0])
        return self.get_metrics_result()

    # ------------------------------------------------------------------------------------------ what it answers

    def call(self, x, noise_std=None):
        """Evaluate the log density (batch, 1), up to a constant, and its gradient, the score (batch, *event).

        Many points are evaluated part by part, which bounds the memory.

        Args:
            x: points (batch, *event), in data units.
            noise_std: of a range of levels, the level (by keyword): a number or one a point (batch,); None is the
                lowest.
        """
        return self.answer(lambda x, noise_std: self.differentiate(x, noise_std)[:2], x, noise_std)

    def log_density(self, x, noise_std=None):
        """Log density (batch, 1) of noisy data up to a constant, one for all levels by the dual term; see ``call``."""
        return self.answer(lambda x, noise_std: self.apply_net(x, tf.math.log(noise_std)), x, noise_std)

    def score(self, x, noise_std=None):
        """Gradient (batch, *event) of the log density with respect to x; see ``call``."""
        return self.answer(lambda x, noise_std: self.differentiate(x, noise_std)[1], x, noise_std)

    def denoise(self, noisy_x, noise_std=None):
        """Posterior mean (batch, *event) of the clean data, noisy_x + noise_std^2 * score(noisy_x); see ``call``.

        It is the formula of Miyasawa (1961) and Robbins (1956); ``noise_std`` is the noise in ``noisy_x``.
        """
        return self.answer(lambda x, s: x + per_event(s, x) ** 2 * self.differentiate(x, s)[1], noisy_x, noise_std)

    def answer(self, function, x, noise_std):
        """``function`` of points (batch, *event) and levels (batch, 1): part by part, where the points are many."""
        x = self.as_tensor(x)
        noise_std = self.noise_range[0] if noise_std is None else noise_std
        checks.check_levels(noise_std, self.noise_range, x.shape[0])
        levels = tf.broadcast_to(tf.reshape(tf.cast(noise_std, x.dtype), (-1, 1)), (tf.shape(x)[0], 1))
        if not tf.executing_eagerly():
            return function(x, levels)
        size = sampling.chunk_size(self.event_shape or x.shape[1:])
        starts = range(0, max(len(x), 1), size)
        parts = [function(x[start : start + size], levels[start : start + size]) for start in starts]
        return parts[0] if len(parts) == 1 else tf.nest.map_structure(lambda *part: tf.concat(part, axis=0), *parts)

    def count_moved(self, x):
        """Number of the first points of a batch that are moved; the rest are sources alone."""
        return -(-tf.shape(x)[0] // self.sources_per_point)

    def add_noise(self, x, key):
        """Draw a noise level, log-uniform in the range, and noise for each of the clean points x (batch, *event).

        Returns noisy_x (batch, *event), noise (batch, *event) in noise units, and noise_std (batch, 1).
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

    # ------------------------------------------------------------------------------------------ construction

    def __init__(self, net, noise_std=0.1, dual_weight=1.0, seed=None, sources_per_point=1, **kwargs):
        """Make a DDE of a network.

        It adds the noise itself: ``dde.compile(); dde.fit(x)`` takes the clean data. Prefer batches of 512, as targets
        are averaged over so many points of the batch, or ``sources_per_point`` times as many.

        Args:
            net: ``keras.Model`` from (batch, *event) to (batch, 1), such as ``build_energy_net(data=x)``; for a range
                of noise levels from [(batch, *event), (batch, 1)], the second input being log(noise_std).
            noise_std: standard deviation of the noise, in data units: a positive number, or a pair (low, high) between
                which it is drawn log-uniformly for each point.
            dual_weight: weight of the dual term; used with a range only. For images, 0 learns the score faster.
            seed: integer that fixes all noise; None draws one from Python's ``random``.
            sources_per_point: with 8, training moves the first 512 points of a batch of 4096, and averages their
                targets over all. In the plane, a density comes closer then, for half as much time again.
            **kwargs: for ``keras.Model``.

        Raises:
            ValueError: for a ``net`` with other inputs or outputs, batch normalization or half precision (float16), or
                other arguments that are not as above. A UserWarning tells of piecewise linear activations such as
                ReLU, whose score is piecewise constant.
        """
        super().__init__(seed, **kwargs)
        self.noise_std, self.noise_range = checks.check_noise_std(noise_std)
        checks.check_energy_net(net, num_inputs=1 + self.noise_conditional)
        self.net = net
        self.dual_weight = checks.check_interval("dual_weight", dual_weight, 0)
        self.sources_per_point = checks.check_integer("sources_per_point", sources_per_point)
        self.loss_tracker = keras.metrics.Mean("loss")
        self.built = net.built

    @property
    def noise_conditional(self):
        """Whether the network covers a range of noise levels."""
        return self.noise_range[0] < self.noise_range[1]

    @property
    def event_shape(self):
        """Shape of a point; None while the network does not know it."""
        shape = checks.input_shape(self.net)
        return None if shape is None else shape[1:]

    networks = property(lambda self: {"net": self.net})
    metrics = property(lambda self: [self.loss_tracker])

    def compile(self, optimizer=None, **options):
        """Set the optimizer; None is ``Adam(1e-3)``. Other arguments as for ``keras.Model.compile``."""
        super().compile(keras.optimizers.Adam(1e-3) if optimizer is None else optimizer, **options)
        if self.built:  # only a built optimizer is saved with its slots
            is_trainable, self.trainable = self.trainable, True  # slots for all weights, so that files fit when thawed
            self.optimizer.build(self.trainable_variables)
            self.trainable = is_trainable

    def get_config(self):
        options = {name: getattr(self, name) for name in ("noise_std", "dual_weight", "seed", "sources_per_point")}
        return {**super().get_config(), "net": keras.saving.serialize_keras_object(self.net), **options}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "net": keras.saving.deserialize_keras_object(config["net"])})


@keras.saving.register_keras_serializable("egm_dde")
class EGM(Trainable):
    """Energy-based generative model: a generator that descends the KL divergence between two DDEs.

    ``dde_real`` learns the noisy density p~ of the data, ``dde_fake`` the noisy density q~ of the generated points, and
    the generator g minimises KL(q~ || p~) (Eq. 8), estimated up to the two constants, in nats, by

        mean of log q~(y) - log p~(y)  at  y = g(z) + noise_std * noise,  z ~ N(0, I).

    The gradient reaches g through y alone: both DDEs are frozen in this step, and no normaliser is needed. (The
    algorithm printed in the paper has a plus sign where its own code descends.) With a range of levels, this is
    averaged over them; ``level_power`` weighs each level by that power of noise_std.
    """

    generator_loss = generator_loss
    train_step = train_step

    def test_step(self, data):
        x = self.read_batch(data)
        z, key = self.draw_latents(tf.shape(x)[0], "evaluate", self.gen_loss_tracker.count)
        self.gen_loss_tracker.update_state(self.generator_loss(z, key), sample_weight=tf.shape(x)[0])
        self.dde_real.test_step(x)
        self.dde_fake.test_step(self.generate(z))
        return self.get_metrics_result()

    # ------------------------------------------------------------------------------------------ what it answers

    def call(self, z):
        """Map latents (batch, *latent) to points (batch, *event) by the averages of the generator's weights."""
        with keras.StatelessScope(list(zip(self.generator.weights, self.averages, strict=True))):
            return tf.cast(self.generator(z), self.variable_dtype)

    def sample(self, n_samples, seed=None, corrected=False, **options):
        """Generate points, a NumPy array (n_samples, *event) in data units, without added noise.

        An integer ``seed`` makes them repeatable; None draws fresh ones. They come from one pass of the generator. With
        ``corrected``, its two densities mend them, so that fewer are where no data are: see
        ``egm_dde.sampling.correct``, also for ``options``.
        """
        checks.check_integer("n_samples", n_samples)
        seed = checks.check_seed(seed)
        if corrected:
            return sampling.correct(self.sample, n_samples, self.dde_real, self.dde_fake, seed=seed, **options)
        if options:
            raise ValueError(f"{', '.join(options)} cannot be given without corrected=True")
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
        z = draws.spread_latents(n_samples, math.prod(self.latent_shape), latent_key, self.variable_dtype)
        return tf.reshape(z, (n_samples, *self.latent_shape)), noise_key

    def update_averages(self):
        """Move the averages towards the generator's weights: slowly, but fast in the first steps."""
        num_steps = tf.cast(self.step, tf.float32) + 1.0
        decay = tf.minimum(self.average_decay, num_steps / (num_steps + 10.0))
        for average, weight in zip(self.averages, self.generator.weights, strict=True):
            average.assign(weight + tf.cast(decay, weight.dtype) * (average - weight))

    def as_subgraph(self, step):
        """``step`` as a graph of its own, where TensorFlow can: traced once for all its calls, and a tenth faster."""
        return step if tf.executing_eagerly() or tf.distribute.has_strategy() else tf.function(step, autograph=False)

    # ------------------------------------------------------------------------------------------ construction

    parts = ("dde_real", "dde_fake", "generator")
    options = ("dde_steps", "real_steps", "latents_per_point", "average_decay", "level_power", "seed")

    def __init__(
        self,
        dde_real,
        dde_fake,
        generator,
        dde_steps=5,
        real_steps=None,
        latents_per_point=2,
        average_decay=0.998,
        level_power=0,
        seed=None,
        **kwargs,
    ):
        """Join two DDEs and a generator.

        The gradient of the generator is right for a ``dde_fake`` that has converged on what the generator makes now, so
        ``dde_fake`` needs the more steps: the data of ``dde_real`` stay the same. A ``dde_real`` that was trained
        before need not go on: with ``dde_real.trainable = False``, set before ``compile``, it stays as it is and is
        measured.

        In all training steps latents are spread evenly over their space. Samples, and what calling the model on latents
        returns, come from ``averages`` of the generator's weights. The losses are those of ``generator`` itself, which
        ``dde_fake`` follows.

        Args:
            dde_real: ``DDE`` of the data.
            dde_fake: ``DDE`` of the generated points, with the same ``noise_std``.
            generator: ``keras.Model`` from latents (batch, *latent) to points (batch, *event).
            dde_steps: steps of ``dde_fake`` for one step of the generator, an integer of at least 1.
            real_steps: steps of ``dde_real`` for one step of the generator; None is as many.
            latents_per_point: number of latents in a step of the generator for each point of the batch of data.
            average_decay: decay in [0, 1) of the moving average of the generator's weights; it is smaller in the first
                steps, so that the average forgets the initial weights.
            level_power: of noise_std, in the weights of the levels in the generator's loss. With 0, the lowest levels,
                whose gradients are the largest, lead. With 2, good for images, each level counts by what the two
                denoisers differ, as in distillation of diffusion models (arXiv:2311.18828).
            seed: integer that fixes all latents and the generator's noise; None draws one from Python's ``random``.
            **kwargs: for ``keras.Model``.

        Raises:
            ValueError: for DDEs that share their network or differ in ``noise_std``, a generator whose output does not
                fit them, networks whose shapes are not known yet, or other arguments out of range.
        """
        super().__init__(seed, **kwargs)
        for name, dde in (("dde_real", dde_real), ("dde_fake", dde_fake)):
            checks.check_instance(name, dde, DDE)
        checks.check_egm_parts(dde_real, dde_fake, generator)
        self.dde_real = dde_real
        self.dde_fake = dde_fake
        self.generator = generator
        self.averages = [
            self.add_weight(weight.shape, "zeros", weight.dtype, trainable=False, aggregation="mean", name="average")
            for weight in generator.weights
        ]
        for average, weight in zip(self.averages, generator.weights, strict=True):
            average.assign(weight)
        self.dde_steps = checks.check_integer("dde_steps", dde_steps)
        self.real_steps = self.dde_steps if real_steps is None else checks.check_integer("real_steps", real_steps)
        self.latents_per_point = checks.check_integer("latents_per_point", latents_per_point)
        self.average_decay = checks.check_interval("average_decay", average_decay, 0, 1)
        self.level_power = checks.check_interval("level_power", level_power, 0)
        self.gen_loss_tracker = keras.metrics.Mean("gen_loss")
        self.built = True

    def compile(self, dde_optimizer=None, gen_optimizer=None, real_optimizer=None, **options):
        """Set the optimizers, of the DDEs too: it compiles both.

        Each network has an optimizer of its own. One that is given for two of them, or in use already, is copied.

        Args:
            dde_optimizer: ``keras.optimizers.Optimizer`` (or its name) of the DDEs. Its learning rate schedule counts
                DDE steps. None is ``Adam(5e-3, beta_1=0.5)``.
            gen_optimizer: the generator's. None is ``Adam(3e-3, beta_1=0.5)``.
            real_optimizer: that of ``dde_real``, if it differs; None is ``dde_optimizer``.
            **options: as for ``keras.Model.compile``, such as ``jit_compile`` and ``steps_per_execution``.

        Optimizers with ``use_ema`` are refused, as are those that have to be copied and cannot, as they have exclusions
        or learning rates of one's own: give three of them.
        """
        if "optimizer" in options:
            raise ValueError("each network of an EGM has its own optimizer: give dde_optimizer and gen_optimizer")
        dde_optimizer = keras.optimizers.get(dde_optimizer or keras.optimizers.Adam(5e-3, beta_1=0.5))
        of_generator, of_fake, of_real = separate_optimizers(
            gen_optimizer=gen_optimizer or keras.optimizers.Adam(3e-3, beta_1=0.5),
            dde_optimizer=dde_optimizer,
            real_optimizer=real_optimizer or dde_optimizer,
        )
        super().compile(of_generator, **options)
        self.optimizer.build(self.generator.trainable_variables)
        self.dde_real.compile(of_real, jit_compile=self.jit_compile)
        self.dde_fake.compile(of_fake, jit_compile=self.jit_compile)

    latent_shape = property(lambda self: checks.input_shape(self.generator)[1:])
    event_shape = property(lambda self: self.dde_real.event_shape)
    noise_range = property(lambda self: self.dde_real.noise_range)

    @property
    def networks(self):
        """Networks by name."""
        return {"dde_real": self.dde_real.net, "dde_fake": self.dde_fake.net, "generator": self.generator}

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
