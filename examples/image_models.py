"""The recipe of ``images.ipynb`` and ``benchmarks/images.py``: a density of images, and a generator that follows it."""

import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from energy_models import DDE, EGM, build_image_energy_net, build_image_generator

DDE_STEPS = 5  # of the fake DDE, for one step of the generator
BATCH_SIZE, STEPS_PER_EPOCH = 64, 50


class Recipe(NamedTuple):
    """Steps of the density of the data and the images in each, and steps of the generator."""

    density_steps: int
    density_batch_size: int
    steps: int


RECIPES = {
    "digits": Recipe(4000, 64, 2000),
    "mnist": Recipe(8000, 64, 8000),
    "fashion_mnist": Recipe(24_000, 128, 4000),
    "celeba": Recipe(8000, 128, 4000),
    "stacked_digits": Recipe(8000, 21, 5000),
    "stacked_mnist": Recipe(8000, 21, 5000),
}


class Scales(NamedTuple):
    """Standard deviation of a pixel, noise levels of its densities, and number of latents of a generator."""

    pixel_std: float
    noise_range: tuple[float, float]
    latent_dim: int


def measure_scales(x):
    """Measure images (n, height, width, channels).

    The levels go from 0.2 standard deviations of a pixel, about its mean over the images, to twice the standard
    deviation along the first principal component, which drowns everything. The latents are as many as the components
    that hold nine tenths of the variance; as many for each channel.
    """
    x, num_channels = x[:20_000], x.shape[-1]
    pixel_std = math.sqrt(x.var(axis=0).mean())
    variances = np.linalg.eigvalsh(np.cov(x.reshape(len(x), -1), rowvar=False))[::-1]
    latent_dim = 1 + int(np.searchsorted(variances.cumsum(), 0.9 * variances.sum()))
    return Scales(pixel_std, (0.2 * pixel_std, 2 * math.sqrt(variances[0])), latent_dim + -latent_dim % num_channels)


def train_density(x, recipe, seed=0, is_stacked=False, **options):
    """Train a DDE on images (n, height, width, channels); options are those of ``keras.Model.fit``."""
    dde = build_density(x, measure_scales(x).noise_range, seed, is_stacked)
    dde.compile(adam(3e-3, recipe.density_steps, recipe.density_steps // 50), jit_compile=True)
    fit(dde, x, recipe.density_steps, recipe.density_batch_size, seed, **options)
    return dde


def build_density(x, noise_range, seed=0, is_stacked=False):
    """Build a DDE of images without the dual term, which outweighs the score where there are many pixels."""
    net = build_image_energy_net(x, seed=seed, separate_channels=is_stacked)
    return DDE(net, noise_range, dual_weight=0, seed=seed)


def train_generator(dde_real, x, recipe, seed=0, is_stacked=False, **options):
    """Train a generator that follows a trained DDE of images; return the EGM. Options are those of ``fit``.

    The fake DDE starts as a copy of the real one and first learns what the generator, a Gaussian at first, makes.
    """
    dde_real.trainable = False
    dde_fake = build_density(x, dde_real.noise_range, seed + 1, is_stacked)
    dde_fake.net.set_weights(dde_real.net.get_weights())
    latent_dim = measure_scales(x).latent_dim
    generator = (build_stack_generator if is_stacked else build_image_generator)(x, latent_dim, seed=seed + 2)
    latents = np.random.default_rng(seed).standard_normal((20_000, latent_dim), dtype=np.float32)
    first_steps = max(1, recipe.steps // 5)
    dde_fake.compile(adam(3e-3, first_steps), jit_compile=True)
    fit(dde_fake, generator.predict(latents, batch_size=1000, verbose=0), first_steps, BATCH_SIZE, seed)
    egm = EGM(
        dde_real, dde_fake, generator, DDE_STEPS, latents_per_point=4, average_decay=0.99, level_power=2, seed=seed
    )
    decays = adam(3e-3, DDE_STEPS * recipe.steps), adam(5e-3, recipe.steps, recipe.steps // 15)
    egm.compile(*decays, jit_compile=True)
    fit(egm, x, recipe.steps, BATCH_SIZE, seed, **options)
    return egm


def build_stack_generator(x, latent_dim, seed=0):
    """Build a generator of single digits, used for each of three channels. Its colours start independent."""
    single = build_image_generator(np.concatenate(np.split(x, 3, axis=-1)), latent_dim // 3, seed=seed)
    z = keras.Input((latent_dim,))
    mixed = z + 0.03 * keras.layers.Dense(latent_dim, use_bias=False, kernel_initializer="zeros")(z)  # mixes slowly
    return keras.Model(z, keras.ops.concatenate([single(share) for share in keras.ops.split(mixed, 3, axis=-1)], -1))


def fit(model, x, num_steps, batch_size, seed=0, **options):
    """Train for a number of steps, in epochs of 50."""
    batches = tf.data.Dataset.from_tensor_slices(x).shuffle(min(len(x), 10_000), seed=seed).repeat().batch(batch_size)
    epochs, steps = -(-num_steps // STEPS_PER_EPOCH), min(num_steps, STEPS_PER_EPOCH)
    model.fit(batches, epochs=epochs, steps_per_epoch=steps, **{"verbose": 0, **options})


def adam(learning_rate, num_steps, warmup_steps=0):
    """Adam whose learning rate rises for some steps and falls to zero along a cosine."""
    start, target = (0.0, learning_rate) if warmup_steps else (learning_rate, None)
    decay = keras.optimizers.schedules.CosineDecay(
        start, num_steps - warmup_steps, warmup_target=target, warmup_steps=warmup_steps
    )
    return keras.optimizers.Adam(decay, beta_1=0.5)
