"""Two densities, and a generator that follows their difference (arXiv:2001.02728): the whole method in one file.

A minute on two CPU cores: python minimal.py [--steps 2000] [--seed 0] [--output minimal.gif]
"""

import argparse

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops, optimizers
from matplotlib import animation, pyplot

LOW, HIGH, WIDTH = 0.05, 1.5, 2.0  # noise finer than an arm of the spirals, noise that hides both; width of the data


def sample_spirals(n):
    """Draw points (n, 2) of two arms, each of one and a half turns."""
    angle = 3 * np.pi * tf.sqrt(tf.random.uniform((n, 1)))  # the root makes an arm as dense outside as inside
    arm = angle / 3 * tf.concat([-tf.cos(angle), tf.sin(angle)], axis=1) + tf.random.uniform((n, 2)) / 6
    return tf.sign(tf.random.uniform((n, 1), -1, 1)) * arm + 0.1 * tf.random.normal((n, 2))


def dense_layers(x, activation, noise_std=0.0):
    """Two layers on sines and cosines of x, which learn fine structure fast. Noise in x damps them."""
    frequencies = 3 * keras.random.normal((2, 64))
    phases, damping = ops.matmul(x, frequencies), ops.exp(-(noise_std**2) * ops.sum(frequencies**2, axis=0) / 2)
    hidden = layers.Concatenate()([x, damping * ops.sin(phases), damping * ops.cos(phases)])  # (batch, 130)
    return layers.Dense(128, activation)(layers.Dense(128, activation)(hidden))


def build_density():
    """Network from points (batch, 2) and log noise levels (batch, 1) to log densities (batch, 1), up to a constant."""
    x, log_std = keras.Input((2,)), keras.Input((1,))
    noise_std, variance = ops.exp(log_std), WIDTH**2 + ops.exp(2 * log_std)
    gaussian = -ops.sum(x**2, axis=-1, keepdims=True) / (2 * variance) - ops.log(variance)  # leads stray points home
    return keras.Model([x, log_std], gaussian + layers.Dense(1, use_bias=False)(dense_layers(x, "tanh", noise_std)))


def add_noise(x):
    """Return noisy points (batch, 2), their noise (batch, 2), and the log noise level of each (batch, 1)."""
    noise, log_std = tf.random.normal(x.shape), tf.random.uniform((len(x), 1), np.log(LOW), np.log(HIGH))
    return x + tf.exp(log_std) * noise, noise, log_std


def density_loss(density, x):
    """Denoise: what predicts -noise / std best is the gradient of the log density of noisy points, the score."""
    y, noise, log_std = add_noise(x)
    with tf.GradientTape() as tape:
        tape.watch((y, log_std))
        log_density = density([y, log_std])
    score, slope = tape.gradient(log_density, (y, log_std))  # (batch, 2), (batch, 1)
    target = tf.reduce_sum(noise**2, axis=-1, keepdims=True) - 2  # of the slope: ties all levels (arXiv:2506.05310)
    return tf.reduce_mean((tf.exp(log_std) * score + noise) ** 2) + tf.reduce_mean((slope - target) ** 2) / 4


def generator_loss(generator, real, fake):
    """KL(generated || data) of noisy points, up to a constant: points move to where real - fake is higher."""
    y, _, log_std = add_noise(generator(tf.random.normal((1024, 2))))
    return tf.reduce_mean(tf.exp(log_std) * (fake([y, log_std]) - real([y, log_std])))  # or low levels would lead alone


def train(steps, seed):
    """Yield the step, the density of the data and the generator, after each training step."""
    keras.utils.set_random_seed(seed)
    z, real, fake = keras.Input((2,)), build_density(), build_density()
    correction = layers.Dense(2, kernel_initializer="zeros")(dense_layers(z, "relu"))
    generator = keras.Model(z, WIDTH * z + correction)  # starts as a Gaussian as wide as the data
    for network, rate, num_updates in (generator, 3e-3, steps), (fake, 5e-3, 3 * steps), (real, 5e-3, 2 * steps):
        network.compile(optimizers.Adam(optimizers.schedules.CosineDecay(rate, num_updates), beta_1=0.5))
    losses = [(generator, lambda: generator_loss(generator, real, fake))]
    losses += 3 * [(fake, lambda: density_loss(fake, generator(tf.random.normal((512, 2)))))]  # has to keep up
    losses += 2 * [(real, lambda: density_loss(real, sample_spirals(512)))]

    @tf.function
    def train_step():
        for network, loss in losses:
            with tf.GradientTape() as tape:
                value = loss()
            network.optimizer.apply(tape.gradient(value, network.trainable_variables), network.trainable_variables)

    for step in range(1, steps + 1):
        train_step()
        yield step, real, generator


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("steps", 2000), ("seed", 0), ("output", "minimal.gif")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments, frames = parser.parse_args(), []
    z, grid = keras.random.normal((2000, 2), seed=0), np.mgrid[-4:4:160j, -4:4:160j].reshape(2, -1).T
    ax = pyplot.figure(figsize=(4.8, 4.8)).add_axes((0, 0, 1, 1), xlim=(-4, 4), ylim=(-4, 4), xticks=(), yticks=())
    for step, real, generator in train(arguments.steps, arguments.seed):
        if step in np.geomspace(1, arguments.steps, 40).astype(int):
            density = np.exp(real([grid, np.full((len(grid), 1), np.log(0.1))])).reshape(160, 160).T
            image = ax.imshow(density, "Blues", extent=(-4, 4, -4, 4), origin="lower", vmax=2 * density.max())
            points = ax.plot(*np.array(generator(z)).T, "o", color="#d55e00", markersize=2, markeredgewidth=0)
            frames.append([image, *points, ax.text(0, 3.7, f"step {step}", ha="center")])
    animation.ArtistAnimation(ax.figure, frames, interval=100).save(arguments.output, "pillow", dpi=100)
