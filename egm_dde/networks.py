"""Networks for points and for images: the layers they are made of, and their builders."""

import itertools
import math

import keras
import numpy as np

from egm_dde import checks

_register = keras.saving.register_keras_serializable("egm_dde")


class _ExactLayer(keras.layers.Layer):
    """A layer that meets points with all their digits, under any dtype policy, and saves its ``options``."""

    options = ()

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **{"dtype": _exact_type()} | kwargs)

    def add_constants(self, initializer="ones", **shapes):
        """Add weights that are not trained, by name."""
        for name, shape in shapes.items():
            setattr(self, name, self.add_weight(shape, initializer, trainable=False, name=name))

    def get_config(self):
        return {**super().get_config(), **{name: getattr(self, name) for name in self.options}}


@_register
class RandomFourierFeatures(_ExactLayer):
    """Map x to [x, sin(x B), cos(x B)] with fixed random frequencies B ~ N(0, scale^2) (arXiv:2006.10739).

    Small networks learn the fine structure of a density fast with them. Given the noise level, each wave is damped the
    way noise n ~ N(0, I) blurs it, E sin((x + noise_std n) b) = exp(-noise_std^2 ||b||^2 / 2) sin(x b), so that the
    smooth densities of large noise are not made of fine waves that have to cancel.

    Args:
        num_features: number of frequencies; the output has ``dim + 2 * num_features`` columns.
        scale: standard deviation of the frequencies, in radians per data unit.
        seed: integer that fixes the frequencies.
    """

    options = ("num_features", "scale", "seed")

    def __init__(self, num_features=64, scale=1.0, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.num_features, self.scale, self.seed = num_features, scale, seed

    def build(self, x_shape, log_noise_std_shape=None):
        normal = keras.initializers.RandomNormal(stddev=self.scale, seed=self.seed)
        self.add_constants(normal, frequencies=(x_shape[-1], self.num_features))

    def call(self, x, log_noise_std=None):
        phases = keras.ops.matmul(x, self.frequencies)  # (batch, num_features)
        waves = [keras.ops.sin(phases), keras.ops.cos(phases)]
        if log_noise_std is not None:
            squared_frequencies = keras.ops.sum(keras.ops.square(self.frequencies), axis=0)  # (num_features,)
            damping = keras.ops.exp(-0.5 * keras.ops.exp(2.0 * log_noise_std) * squared_frequencies)
            waves = [damping * wave for wave in waves]
        return keras.ops.concatenate([x, *waves], axis=-1)


class _NoisyGaussianLayer(_ExactLayer):
    """A layer that knows the variance of noisy points; ``data_std`` is that of the clean ones, roughly, data units."""

    options = ("data_std",)

    def __init__(self, data_std, **kwargs):
        super().__init__(**kwargs)
        self.data_std = data_std

    def noisy_variance(self, x, log_noise_std):
        """data_std^2 + noise_std^2, (batch, 1); a scalar without a noise level."""
        variance = keras.ops.cast(self.data_std**2, x.dtype)
        return variance if log_noise_std is None else variance + keras.ops.exp(2.0 * log_noise_std)


@_register
class NoiseScaling(_NoisyGaussianLayer):
    """Divide points by sqrt(data_std^2 + noise_std^2), so that they are about as wide at every noise level.

    A network sees noise of 3 and noise of 0.1 on one scale then (arXiv:2206.00364, Section 5).
    """

    def call(self, x, log_noise_std=None):
        return x / keras.ops.sqrt(self.noisy_variance(x, log_noise_std))


@_register
class GaussianLogDensity(_NoisyGaussianLayer):
    """Log density of N(0, (data_std^2 + noise_std^2) I): the base measure that an energy network corrects.

    It makes exp(log density) integrable and gives points far from the data a score that leads home.
    """

    def call(self, x, log_noise_std=None):
        return keras.ops.sum(_log_normal(x, 0.0, self.noisy_variance(x, log_noise_std)), axis=-1, keepdims=True)


@_register
class CorrelatedGaussian(_ExactLayer):
    """Log density (batch, 1) of noisy points, if the clean ones were Gaussian with the mean and covariance of the data.

    ``components`` (d, d) are the principal components, in columns, and ``variances`` (d,) those along them.
    """

    def build(self, x_shape, log_noise_std_shape=None):
        dim = math.prod(x_shape[1:])
        self.add_constants(mean=(dim,), components=(dim, dim), variances=(dim,))

    def call(self, x, log_noise_std):
        flat = keras.ops.reshape(x, (-1, self.mean.shape[0]))
        coordinates = keras.ops.matmul(flat - self.mean, self.components)
        variances = self.variances + keras.ops.exp(2.0 * log_noise_std)  # (batch, d)
        return keras.ops.sum(_log_normal(coordinates, 0.0, variances), axis=-1, keepdims=True)


@_register
class PixelMixture(_NoisyGaussianLayer):
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
        parts = keras.ops.log(self.shares) + _log_normal(x, means, variances + noise_variance)
        log_ratios = keras.ops.logsumexp(parts, axis=1, keepdims=True) - _log_normal(x, mean, variance + noise_variance)
        fading = 1.0 / (1.0 + 4.0 / self.data_std**2 * keras.ops.exp(2.0 * log_noise_std))
        return fading * keras.ops.sum(log_ratios, axis=(2, 3, 4))


@_register
class Windows(_ExactLayer):
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


@_register
class ScoreScaling(_NoisyGaussianLayer):
    """Multiply by sqrt(data_std^2 + noise_std^2) / noise_std: the lower the noise, the steeper the log density."""

    def call(self, hidden, log_noise_std):
        hidden = keras.ops.cast(hidden, log_noise_std.dtype)
        return hidden * keras.ops.sqrt(self.noisy_variance(hidden, log_noise_std)) * keras.ops.exp(-log_noise_std)


def build_energy_net(
    dim=2,
    noise_conditional=False,
    widths=(128, 128),
    activation="tanh",
    num_features=None,
    feature_scale=3.0,
    data_std=2.0,
    seed=0,
):
    """Build the network of a DDE: random Fourier features, dense layers, one scalar, plus a Gaussian base measure.

    Few waves fill a plane, but not a space of many dimensions. There, the points are divided by
    sqrt(data_std^2 + noise_std^2) instead, and three layers of 256 with "silu" learn well up to some 60 dimensions.

    Args:
        dim: number of coordinates of a point.
        noise_conditional: False for a network of one noise level, ``net(x)``; True for a network of a range of
            levels, ``net([x, log(noise_std)])`` with the second input of shape (batch, 1).
        widths: units of the dense layers.
        activation: a smooth activation; a piecewise linear one such as ReLU has a piecewise constant score.
        num_features: number of random Fourier features of the point; None is 64 in up to three dimensions, 0 in more.
        feature_scale: standard deviation of their frequencies, in radians per data unit.
        data_std: standard deviation of the data, roughly, and of the base measure, in data units.
        seed: integer that fixes the initial weights.

    Returns:
        A Functional ``keras.Model`` with output (batch, 1): the log density of the noisy data up to a constant.
    """
    checks.check_sizes_and_scales({"dim": dim}, widths, {"feature_scale": feature_scale, "data_std": data_std})
    if num_features is None:
        num_features = 64 if dim <= 3 else 0
    checks.check_integer("num_features, unless it is None,", num_features, 0)
    seed = checks.check_seed(seed)
    initializers = _initializers("GlorotUniform", seed)
    x = keras.Input((dim,), dtype=_exact_type(), name="x")
    log_noise_std = keras.Input((1,), dtype=_exact_type(), name="log_noise_std") if noise_conditional else None
    first = RandomFourierFeatures(num_features, feature_scale, seed) if num_features else NoiseScaling(data_std)
    hidden = first(x, log_noise_std)
    if noise_conditional:
        hidden = keras.layers.Concatenate()([hidden, log_noise_std])
    hidden = _stack_dense_layers(hidden, widths, activation, initializers)
    base_measure = GaussianLogDensity(data_std)(x, log_noise_std)
    return _energy_model("energy_net", x, log_noise_std, hidden, base_measure, next(initializers))


def build_generator(  # noqa: D417
    latent_dim=2, dim=2, widths=(128, 128), activation="relu", num_features=64, feature_scale=3.0, data_std=2.0, seed=0
):
    """Build the generator: random Fourier features of a standard normal latent, dense layers, a point.

    If the latent has as many coordinates as the point, the layers correct the map ``data_std * z``: the generator
    starts as a Gaussian about as wide as the data, without folds, and moves every point to data near by.

    Args:
        latent_dim: number of coordinates of the latent z ~ N(0, I).
        dim, widths, feature_scale, data_std, seed: as in ``build_energy_net``.
        activation: any activation; the generator needs no smooth derivative.
        num_features: number of random Fourier features of the latent.

    Returns:
        A Functional ``keras.Model`` from (batch, latent_dim) to (batch, dim).
    """
    sizes = {"latent_dim": latent_dim, "dim": dim, "num_features": num_features}
    checks.check_sizes_and_scales(sizes, widths, {"feature_scale": feature_scale, "data_std": data_std})
    seed, exact = checks.check_seed(seed), _exact_type()
    initializers = _initializers("HeNormal" if activation == "relu" else "GlorotUniform", seed)
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    hidden = RandomFourierFeatures(num_features, feature_scale, seed)(z)
    hidden = _stack_dense_layers(hidden, widths, activation, initializers)
    is_correction = latent_dim == dim
    last = keras.initializers.VarianceScaling(0.01, seed=seed) if is_correction else next(initializers)
    y = keras.layers.Dense(dim, kernel_initializer=last, dtype=exact)(hidden)
    if is_correction:
        y = keras.layers.Add(dtype=exact)([keras.layers.Rescaling(data_std, dtype=exact)(z), y])
    return keras.Model(z, y, name="generator")


def build_image_energy_net(images, widths=(512, 512), activation="silu", seed=0, separate_channels=False):  # noqa: D417
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
    initializers = _initializers("GlorotUniform", checks.check_seed(seed))
    x = keras.Input(event_shape, dtype=_exact_type(), name="x")
    log_noise_std = keras.Input((1,), dtype=_exact_type(), name="log_noise_std")
    data_std = math.sqrt(np.mean(np.var(images[:20_000], axis=0)))
    scaled = NoiseScaling(data_std)(keras.ops.reshape(x, (-1, math.prod(event_shape))), log_noise_std)
    scaled = keras.ops.reshape(scaled, (-1, *event_shape))
    windows = keras.ops.stack([Windows()(part) for part in keras.ops.split(scaled, num_parts, axis=-1)], axis=1)
    hidden = _append_level(windows, log_noise_std)  # (batch, parts, windows, pixels and level)
    found = []
    for width in (128, 64):
        hidden = _stack_dense_layers(hidden, (width,), activation, initializers)
        found.append(keras.ops.sum(hidden, axis=(1, 2)))
    hidden = keras.layers.Reshape((num_parts, -1))(hidden)
    for width in widths:
        hidden = _stack_dense_layers(_append_level(hidden, log_noise_std), (width,), activation, initializers)
        hidden = keras.layers.Flatten()(hidden)  # the first layer looks at each part, those after it at all of them
    hidden = ScoreScaling(data_std)(keras.layers.Concatenate()([*found, hidden]), log_noise_std)
    gaussian, mixture = CorrelatedGaussian(), PixelMixture(data_std)
    parts = keras.ops.split(x, num_parts, axis=-1)
    base_measure = sum((gaussian(part, log_noise_std) for part in parts), mixture(x, log_noise_std))
    gaussian.set_weights(statistics)
    mixture.set_weights(_pixel_statistics(images))
    return _energy_model("image_energy_net", x, log_noise_std, hidden, base_measure, next(initializers))


def build_image_generator(images, latent_dim=32, widths=(384, 384, 384), seed=0):  # noqa: D417
    """Build the generator of images: the Gaussian of the widest directions of the data, corrected by dense layers.

    From random weights, it would start narrow, grow in leaps that its density estimator cannot follow, and lose modes.
    All of it is trained. Pixels that are darker or brighter than any of ``images`` come back nineteen twentieths of the
    way: a hard bound would have no gradient that leads back.

    Args:
        images, widths, seed: as in ``build_image_energy_net``; the layers have ReLU.
        latent_dim: number of coordinates of the latent z ~ N(0, I), at most that of a flat image.

    Returns:
        A Functional ``keras.Model`` from (batch, latent_dim) to (batch, height, width, channels).
    """
    mean, components, variances = _principal_components(images)
    checks.check_sizes_and_scales({}, widths, {})
    checks.check_integer("latent_dim", latent_dim, 1, len(mean) + 1)
    seed, exact = checks.check_seed(seed), _exact_type()
    initializers = _initializers("HeNormal", seed)
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    linear = keras.layers.Dense(len(mean), dtype=exact)
    start = linear(z)
    linear.set_weights([(components * np.sqrt(variances))[:, :latent_dim].T, mean])  # not an initializer: saved once
    hidden = _stack_dense_layers(z, widths, "relu", initializers)
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


def _log_normal(x, mean, variance):
    """Log density of each x in N(mean, variance)."""
    return -0.5 * (keras.ops.square(x - mean) / variance + keras.ops.log(2.0 * math.pi * variance))


def _exact_type():
    """The type of points and log densities: with mixed precision, the hidden layers alone are coarse."""
    return keras.config.dtype_policy().variable_dtype


def _energy_model(name, x, log_noise_std, hidden, base_measure, initializer):
    """The model whose output is one number from the hidden units, plus the log density of the base measure."""
    exact = _exact_type()
    # A bias here would be the log density's free constant: it has no gradient.
    correction = keras.layers.Dense(1, use_bias=False, kernel_initializer=initializer, dtype=exact)(hidden)
    log_density = keras.layers.Add(dtype=exact)([correction, base_measure])
    return keras.Model(x if log_noise_std is None else [x, log_noise_std], log_density, name=name)


def _append_level(hidden, log_noise_std):
    """Append the noise level to hidden units (batch, ..., units)."""
    level = keras.ops.reshape(log_noise_std, (-1, *(1,) * (len(hidden.shape) - 1)))
    return keras.layers.Concatenate()([hidden, level * keras.ops.ones_like(hidden[..., :1])])


def _stack_dense_layers(hidden, widths, activation, initializers):
    for width in widths:
        hidden = keras.layers.Dense(width, activation, kernel_initializer=next(initializers))(hidden)
    return hidden


def _initializers(name, seed):
    """Yield initializers with seeds of their own: equal shapes must not get equal weights."""
    initializer = getattr(keras.initializers, name)
    return (initializer(seed=10_000 * seed + offset) for offset in itertools.count(1))
