"""The method: denoising density estimators (DDE) and a generator that descends between two of them (EGM).

Three functions are the method (arXiv:2001.02728); read them first:

* ``DDE.denoising_loss``: Eq. 5, and the dual term that ties the noise levels together (arXiv:2506.05310).
* ``EGM.generator_loss``: Eq. 8, the KL divergence that the generator descends.
* ``EGM.train_step``: one step of the generator, then some of each DDE.

One sign convention throughout: a network outputs a **log density** up to a constant (the energy is its negative), the
gradient of the log density with respect to the point is the **score**, and at ``x + noise_std * noise`` with standard
normal ``noise`` the regression target of the score is ``-noise / noise_std``.
"""

import math

import keras
import tensorflow as tf

from egm_dde import checks, draws
from egm_dde.density import DensityModel, per_event
from egm_dde.generation import GeneratorModel, copy_network
from egm_dde.networks import build_energy_net, build_generator, build_image_energy_net, build_image_generator
from egm_dde.targets import average_over_sources, expected_square

__all__ = ["DDE", "EGM", "build_energy_net", "build_generator", "build_image_energy_net", "build_image_generator"]


@keras.saving.register_keras_serializable("egm_dde")
class DDE(DensityModel):
    """Denoising density estimator: a scalar network whose output is the log density of the noisy data.

    For data x and y = x + noise_std * noise, noise ~ N(0, I), it minimises (Eq. 5, in noise units)

        E ||noise_std * grad_y f(y) + noise||^2 / d,

    whose minimiser is f = log p~ + constant, with p~ = p * N(0, noise_std^2 I) the density of y. A loss of 1 means
    "learned nothing"; the unavoidable part is 1 - noise_std^2 * J / d, with J = E ||grad log p~||^2 the Fisher
    information of p~. With a range of levels, the derivative along the level is fitted too, by the dual term

        E (d f(y, noise_std) / d log(noise_std) - (||noise||^2 - d))^2 / (2 d),

    which ties all levels to one constant and so gets the relative mass of far modes right. It is 1 at first as well.
    """

    def denoising_loss(self, x, key, training=False):
        """The training loss on clean points x (batch, *event), in noise units; ``key`` is that of the noise."""
        noisy_x, noise, noise_std = self.add_noise(x, key)
        # The noise is one guess at where a noisy point came from. The network meets the mean of all guesses.
        mean_noise, squared_norm, mean_squared_norm = average_over_sources(x, noisy_x, noise, noise_std)
        _, score, level_slope = self.differentiate(noisy_x, noise_std, training)

        # Eq. 5: noise_std * score is to predict minus the noise.
        loss = tf.reduce_mean(expected_square(per_event(noise_std, x) * score, -noise, -mean_noise))
        if self.noise_conditional and self.dual_weight > 0:
            # Dual term: the derivative along log(noise_std) is to predict ||noise||^2 - d.
            dim = math.prod(x.shape[1:])
            squares = expected_square(level_slope, squared_norm - dim, mean_squared_norm - dim)  # (batch, 1)
            loss += self.dual_weight * tf.reduce_mean(squares) / (2 * dim)
        return loss

    def train_step(self, data):
        x = self.read_batch(data)
        key = draws.draw_key(self.seed, "train", self.optimizer.iterations)
        loss = self.descend(self.optimizer, self, lambda: self.denoising_loss(x, key, training=True))
        self.loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return self.get_metrics_result()

    def test_step(self, data):
        x = self.read_batch(data)
        # Keyed by the points seen since the metrics were reset: each evaluation meets the same noise.
        key = draws.draw_key(self.seed, "evaluate", self.loss_tracker.count)
        self.loss_tracker.update_state(self.denoising_loss(x, key), sample_weight=tf.shape(x)[0])
        return self.get_metrics_result()

    def __init__(self, net, noise_std=0.1, dual_weight=1.0, seed=None, **kwargs):
        """Make a DDE of a network.

        It adds the noise itself: ``dde.compile(); dde.fit(x)`` takes the clean data. Prefer batches of 512, as targets
        are averaged over so many points of the batch at most.

        Args:
            net: ``keras.Model`` from (batch, *event) to (batch, 1), such as ``build_energy_net()``; for a range of
                noise levels from [(batch, *event), (batch, 1)], the second input being log(noise_std).
            noise_std: standard deviation of the noise, in data units: a positive number, or a pair (low, high) between
                which it is drawn log-uniformly for each point.
            dual_weight: weight of the dual term; used with a range only. For images, 0 learns the score faster.
            seed: integer that fixes all noise; None draws one from Python's ``random``.
            **kwargs: for ``keras.Model``.

        Raises:
            ValueError: for a ``net`` with other inputs or outputs, batch normalization or half precision (float16), or
                other arguments that are not as above.

        Warns:
            UserWarning: for piecewise linear activations such as ReLU, whose score is piecewise constant.
        """
        # The layers of the network cast by themselves; points, noise and losses stay exact.
        super().__init__(autocast=False, **kwargs)
        self.noise_std, self.noise_range = checks.check_noise_std(noise_std)
        checks.check_energy_net(net, num_inputs=1 + self.noise_conditional)
        self.net = net
        self.dual_weight = checks.check_interval("dual_weight", dual_weight, 0)
        self.seed = checks.check_seed(seed)
        self.loss_tracker = keras.metrics.Mean("loss")
        self.built = net.built


@keras.saving.register_keras_serializable("egm_dde")
class EGM(GeneratorModel):
    """Energy-based generative model: a generator that descends the KL divergence between two DDEs.

    ``dde_real`` learns the noisy density p~ of the data, ``dde_fake`` the noisy density q~ of the generated points, and
    the generator g minimises KL(q~ || p~) (Eq. 8), estimated up to the two constants, in nats, by

        mean of log q~(y) - log p~(y)  at  y = g(z) + noise_std * noise,  z ~ N(0, I).

    The gradient reaches g through y alone: both DDEs are frozen in this step, and no normaliser is needed. (The
    algorithm printed in the paper has a plus sign where its own code descends.) With a range of levels, this is
    averaged over them; ``level_power`` weighs each level by that power of noise_std.
    """

    def generator_loss(self, z, key, training=False):
        """KL(q~ || p~) up to a constant, in nats, at latents z (batch, *latent); ``key`` is that of the noise."""
        noisy_y, _, noise_std = self.dde_fake.add_noise(self.generate(z, training), key)
        log_ratio = self.dde_fake.log_density(noisy_y, noise_std) - self.dde_real.log_density(noisy_y, noise_std)
        weights = noise_std**self.level_power
        return tf.reduce_mean(weights * log_ratio) / tf.reduce_mean(weights)

    def train_step(self, data):
        x = self.read_batch(data)
        num_points = tf.shape(x)[0]

        # One step of the generator. Its gradient is the noisiest of the three, so it uses more latents than points ...
        z, key = self.draw_latents(self.latents_per_point * num_points, "generator", self.optimizer.iterations)
        gen_loss = self.descend(
            self.optimizer, self.generator, lambda: self.generator_loss(z, key, training=True), "gen_loss"
        )
        self.gen_loss_tracker.update_state(gen_loss, sample_weight=num_points)
        self.average_weights()

        # ... then some of each DDE, with fresh noise in each, and fresh generated points.
        step_real, step_fake = (self.as_subgraph(dde.train_step) for dde in (self.dde_real, self.dde_fake))
        if self.dde_real.trainable_variables:
            for _ in range(self.real_steps):
                step_real(x)
        else:
            self.dde_real.test_step(x)  # it is frozen, and measured
        for _ in range(self.dde_steps):
            z, _ = self.draw_latents(num_points, "latents", self.dde_fake.optimizer.iterations)
            step_fake(self.generate(z, training=True))
        return self.get_metrics_result()

    def test_step(self, data):
        x = self.read_batch(data)
        z, key = self.draw_latents(tf.shape(x)[0], "evaluate", self.gen_loss_tracker.count)
        self.gen_loss_tracker.update_state(self.generator_loss(z, key), sample_weight=tf.shape(x)[0])
        self.dde_real.test_step(x)
        self.dde_fake.test_step(self.generate(z))
        return self.get_metrics_result()

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
        returns, come from ``average_generator``. The losses are those of ``generator`` itself, which ``dde_fake``
        follows.

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
            ValueError: for DDEs that are the same object, share their network or differ in ``noise_std``, a generator
                whose output does not fit them, networks whose shapes are not known yet, or other arguments out of
                range.
        """
        super().__init__(autocast=False, **kwargs)
        for name, dde in (("dde_real", dde_real), ("dde_fake", dde_fake)):
            if not isinstance(dde, DDE):
                raise ValueError(f"{name} must be a DDE, got {dde!r}")
        checks.check_egm_parts(dde_real, dde_fake, generator)
        self.dde_real = dde_real
        self.dde_fake = dde_fake
        self.generator = generator
        self.average_generator = copy_network(generator)
        self.average_generator.trainable = False
        self.dde_steps = checks.check_integer("dde_steps", dde_steps)
        self.real_steps = self.dde_steps if real_steps is None else checks.check_integer("real_steps", real_steps)
        self.latents_per_point = checks.check_integer("latents_per_point", latents_per_point)
        self.average_decay = checks.check_interval("average_decay", average_decay, 0, 1)
        self.level_power = checks.check_interval("level_power", level_power, 0)
        self.seed = checks.check_seed(seed)
        self.gen_loss_tracker = keras.metrics.Mean("gen_loss")
        self.built = True

    def compile(self, dde_optimizer=None, gen_optimizer=None, real_optimizer=None, **options):
        """Set the optimizers, of the DDEs too: it compiles both.

        Args:
            dde_optimizer: ``keras.optimizers.Optimizer`` (or its name) of the DDEs; each DDE gets a copy of its own.
                Its learning rate schedule counts DDE steps. None is ``Adam(5e-3, beta_1=0.5)``.
            gen_optimizer: the generator's. None is ``Adam(3e-3, beta_1=0.5)``.
            real_optimizer: that of ``dde_real``, if its schedule counts other steps; None is ``dde_optimizer``.
            **options: as for ``keras.Model.compile``, such as ``jit_compile`` and ``steps_per_execution``.
        """
        dde_optimizer = keras.optimizers.get(dde_optimizer or keras.optimizers.Adam(5e-3, beta_1=0.5))
        gen_optimizer = keras.optimizers.get(gen_optimizer or keras.optimizers.Adam(3e-3, beta_1=0.5))
        real_optimizer = keras.optimizers.get(real_optimizer or dde_optimizer)
        # Copies with the same settings: an optimizer belongs to the variables it was built on.
        optimizers = (gen_optimizer, real_optimizer, dde_optimizer)
        of_generator, of_real, of_fake = (optimizer.from_config(optimizer.get_config()) for optimizer in optimizers)
        super().compile(of_generator, **options)
        self.optimizer.build(self.generator.trainable_variables)
        self.dde_real.compile(of_real, jit_compile=self.jit_compile)
        self.dde_fake.compile(of_fake, jit_compile=self.jit_compile)
