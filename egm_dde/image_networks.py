"""Networks for images: the layers they are made of, and their builders."""

import math

import keras
import numpy as np

from egm_dde import checks, networks
from egm_dde.networks import exact_type, log_normal, stack_dense_layers


@networks.register
class PixelMixture(networks.DataLayer):
    """Log density (batch, 1) of noisy pixels, each a mixture of black, white and grey, over that of Gaussian pixels.

    It adds to a Gaussian of images that most pixels of a drawing are as black or white as can be. Where the noise is
    half as wide as the pixels and more, neighbours tell more than the pixel itself: the log ratio fades out.
    """

    def build(self, x_shape, log_noise_std_shape=None):
        self.add_constants(shares=(3, *x_shape[1:]), means=(3,), variances=(3,))

    def call(self, x, log_noise_std):
        x, noise_variance = x[:, None], keras.ops.reshape(keras.ops.exp(2.0 * log_noise_std), (-1, 1, 1, 1, 1))
        means, variances = (keras.ops.reshape(each, (3, 1, 1, 1)) for each in (self.means, self.variances))
        mean = keras.ops.sum(self.shares * means, axis=0)  # (height, width, channels)
        variance = keras.ops.sum(self.shares * (variances + means**2), axis=0) - mean**2
        parts = keras.ops.log(self.shares) + log_normal(x, means, variances + noise_variance)
        log_ratios = keras.ops.logsumexp(parts, axis=1, keepdims=True) - log_normal(x, mean, variance + noise_variance)
        fading = 1.0 / (1.0 + 4.0 / self.data_std**2 * keras.ops.exp(2.0 * log_noise_std))
        return fading * keras.ops.sum(log_ratios, axis=(2, 3, 4))


@networks.register
class Windows(networks.ExactLayer):
    """Cut images (batch, height, width, channels) into overlapping windows (batch, number of windows, pixels).

    They are squares of 8 pixels, 4 apart; a quarter of the outermost ones lies beyond the image.
    """

    def call(self, x):
        stride, (height, width, channels) = 4, x.shape[1:]
        rows, columns = (-(-size // stride) + 1 for size in (height, width))  # of blocks, of which four make a window
        margins = (rows * stride - height, columns * stride - width)
        x = keras.ops.pad(x, [(0, 0), *((margin // 2, margin - margin // 2) for margin in margins), (0, 0)])
        blocks = keras.ops.reshape(x, (-1, rows, stride, columns, stride, channels))
        blocks = keras.ops.transpose(blocks, (0, 1, 3, 2, 4, 5))  # (batch, rows, columns, stride, stride, channels)
        corners = [blocks[:, i : rows - 1 + i, j : columns - 1 + j] for i in (0, 1) for j in (0, 1)]
        windows = keras.ops.stack(corners, axis=3)
        return keras.ops.reshape(windows, (-1, (rows - 1) * (columns - 1), 4 * stride**2 * channels))


@networks.register
class ScoreScaling(networks.DataLayer):
    """Multiply by sqrt(data_std^2 + noise_std^2) / noise_std: the lower the noise, the steeper the log density."""

    def call(self, hidden, log_noise_std):
        hidden = keras.ops.cast(hidden, log_noise_std.dtype)
        return hidden * keras.ops.sqrt(self.noisy_variance(hidden, log_noise_std)) * keras.ops.exp(-log_noise_std)


def build_image_energy_net(images, widths=(256, 512), activation="silu", seed=0, separate_channels=False):  # noqa: D417
    """Build the network of a DDE of images: from [images, log(noise_std) (batch, 1)] to (batch, 1), a ``keras.Model``.

    Two dense layers look at each window of 8 x 8 pixels, every 4 pixels; those of ``widths`` look at what they found in
    all windows. With the second derivatives of training, a CPU does this faster than convolutions. The layers learn
    what a Gaussian of the images and a mixture for pixels do not know. The output is the log density up to a constant.

    Args:
        images: images to train on (n, height, width, channels), for mean, covariance and shares of black and white,
            which are the smallest and the largest number in them; 20,000 images are used at most.
        widths, activation, seed: as in ``build_energy_net``.
        separate_channels: whether Gaussian, windows and the first of ``widths`` look at each channel alone, all with
            the same weights, for channels that have little in common; the colours of a photograph have much.
    """
    event_shape = checks.check_images(images).shape[1:]
    num_parts = event_shape[-1] if separate_channels else 1
    statistics = _principal_components(np.concatenate(np.split(images[: 20_000 // num_parts], num_parts, axis=-1)))
    checks.check_sizes_and_scales({}, widths, {})
    initial = networks.initializers("GlorotUniform", checks.check_seed(seed))
    x = keras.Input(event_shape, dtype=exact_type(), name="x")
    log_noise_std = keras.Input((1,), dtype=exact_type(), name="log_noise_std")
    data_std = math.sqrt(np.mean(np.var(images[:20_000], axis=0)))
    scaled = networks.NoiseScaling(data_std)(keras.ops.reshape(x, (-1, math.prod(event_shape))), log_noise_std)
    scaled = keras.ops.reshape(scaled, (-1, *event_shape))
    windows = keras.ops.stack([Windows()(part) for part in keras.ops.split(scaled, num_parts, axis=-1)], axis=1)
    hidden = append_level(windows, log_noise_std)  # (batch, parts, windows, pixels and level)
    found = []
    for width in (128, 64):
        hidden = stack_dense_layers(hidden, (width,), activation, initial)
        found.append(keras.ops.sum(hidden, axis=(1, 2)))
    hidden = keras.layers.Reshape((num_parts, -1))(hidden)
    for width in widths:
        hidden = stack_dense_layers(append_level(hidden, log_noise_std), (width,), activation, initial)
        hidden = keras.layers.Flatten()(hidden)  # the first layer looks at each part, those after it at all of them
    hidden = ScoreScaling(data_std)(keras.layers.Concatenate()([*found, hidden]), log_noise_std)
    gaussian, mixture = networks.CorrelatedGaussian(), PixelMixture(data_std)
    parts = keras.ops.split(x, num_parts, axis=-1)
    base_measure = sum((gaussian(part, log_noise_std) for part in parts), mixture(x, log_noise_std))
    gaussian.set_weights(statistics)
    mixture.set_weights(_pixel_statistics(images))
    return networks.energy_model("image_energy_net", x, log_noise_std, hidden, base_measure, next(initial))


def build_image_generator(images, latent_dim=32, widths=(384, 384, 384), seed=0):  # noqa: D417
    """Build the generator of images: the Gaussian of the widest directions of the data, corrected by dense layers.

    From random weights, it would start narrow, grow in leaps that its density estimator cannot follow, and lose modes.
    All of it is trained. Pixels that are darker or brighter than any of ``images`` come back nineteen twentieths of the
    way: a hard bound would have no gradient that leads back.

    Args:
        images, widths, seed: as in ``build_image_energy_net``; the layers have ReLU.
        latent_dim: number of coordinates of the latent z ~ N(0, I), at most that of a flat image.

    Returns a Functional ``keras.Model`` from (batch, latent_dim) to (batch, height, width, channels).
    """
    mean, components, variances = _principal_components(images)
    checks.check_sizes_and_scales({}, widths, {})
    checks.check_integer("latent_dim", latent_dim, 1, len(mean) + 1)
    seed, exact = checks.check_seed(seed), exact_type()
    initial = networks.initializers("HeNormal", seed)
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    linear = keras.layers.Dense(len(mean), dtype=exact)
    start = linear(z)
    linear.set_weights([(components * np.sqrt(variances))[:, :latent_dim].T, mean])  # not an initializer: saved once
    hidden = stack_dense_layers(z, widths, "relu", initial)
    small = keras.initializers.VarianceScaling(0.01, seed=seed)
    correction = keras.layers.Dense(len(mean), kernel_initializer=small, dtype=exact)(hidden)
    pixels = keras.layers.Add(dtype=exact)([start, correction])
    low, high = float(np.min(images)), float(np.max(images))
    pixels = 0.05 * pixels + 0.95 * (keras.layers.ReLU(high - low, dtype=exact)(pixels - low) + low)
    return keras.Model(z, keras.layers.Reshape(np.shape(images)[1:], dtype=exact)(pixels), name="image_generator")


def _principal_components(images):
    """Mean (d,), principal components (d, d), widest first, and variances (d,) of flat images."""
    flat = np.array([image.ravel() for image in checks.check_images(images)[:20_000]], dtype=float)
    variances, components = np.linalg.eigh(np.cov(flat, rowvar=False))
    # Pixels that never change would have an infinitely narrow Gaussian.
    variances = np.maximum(variances[::-1], 0.15**2 * flat.var(axis=0).mean())
    return flat.mean(axis=0), components[:, ::-1], variances


def _pixel_statistics(images):
    """Shares (3, height, width, channels) of black, white and grey in each pixel, their means and variances (3,)."""
    images = np.asarray(images[:20_000], dtype=float)
    low, width = images.min(), np.ptp(images)
    places = (images - low) / width  # from 0 to 1
    shares = np.stack([np.mean(part, axis=0) for part in (places < 0.05, places > 0.95, abs(places - 0.5) <= 0.45)])
    means, stds = low + width * np.array([0, 1, 0.5]), width * np.array([0.02, 0.02, 12**-0.5])
    return (shares + 1e-3) / 1.003, means, stds**2  # a share of zero has no logarithm


def append_level(hidden, log_noise_std):
    """Append the noise level to hidden units (batch, ..., units)."""
    level = keras.ops.reshape(log_noise_std, (-1, *(1,) * (len(hidden.shape) - 1)))
    return keras.layers.Concatenate()([hidden, level * keras.ops.ones_like(hidden[..., :1])])
