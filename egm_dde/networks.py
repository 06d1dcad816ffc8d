"""Networks for points and for images: the layers they are made of, and their builders."""

import functools
import itertools
import math

import keras
import numpy as np

from egm_dde import checks

_register = keras.saving.register_keras_serializable("egm_dde")


class _ExactLayer(keras.layers.Layer):
    """A layer that meets points with all their digits, under any dtype policy, and saves its ``options``."""

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def add_normal(self, name, shape, stddev, seed):
        """Add fixed weights drawn from N(0, stddev^2)."""
        initializer = keras.initializers.RandomNormal(stddev=stddev, seed=seed)
        return self.add_weight(shape=shape, initializer=initializer, trainable=False, name=name)

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
        self.frequencies = self.add_normal("frequencies", (x_shape[-1], self.num_features), self.scale, self.seed)

    def call(self, x, log_noise_std=None):
        phases = keras.ops.matmul(x, self.frequencies)  # (batch, num_features)
        waves = [keras.ops.sin(phases), keras.ops.cos(phases)]
        if log_noise_std is not None:
            squared_frequencies = keras.ops.sum(keras.ops.square(self.frequencies), axis=0)  # (num_features,)
            damping = keras.ops.exp(-0.5 * keras.ops.exp(2.0 * log_noise_std) * squared_frequencies)
            waves = [damping * wave for wave in waves]
        return keras.ops.cast(keras.ops.concatenate([x, *waves], axis=-1), self.compute_dtype)

    def compute_output_shape(self, x_shape, log_noise_std_shape=None):
        return (*x_shape[:-1], x_shape[-1] + 2 * self.num_features)


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
        variance = keras.ops.reshape(self.noisy_variance(x, log_noise_std), (-1,) + (1,) * (x.ndim - 1))
        return keras.ops.cast(x / keras.ops.sqrt(variance), self.compute_dtype)

    def compute_output_shape(self, x_shape, log_noise_std_shape=None):
        return x_shape


@_register
class GaussianLogDensity(_NoisyGaussianLayer):
    """Log density of N(0, (data_std^2 + noise_std^2) I): the base measure that an energy network corrects.

    It makes exp(log density) integrable and gives points far from the data a score that leads home.
    """

    def call(self, x, log_noise_std=None):
        variance, dim = self.noisy_variance(x, log_noise_std), math.prod(x.shape[1:])
        squared_norm = keras.ops.sum(keras.ops.square(keras.ops.reshape(x, (-1, dim))), axis=-1, keepdims=True)
        return -0.5 * (squared_norm / variance + dim * keras.ops.log(2.0 * math.pi * variance))

    def compute_output_shape(self, x_shape, log_noise_std_shape=None):
        return (x_shape[0], 1)


def build_energy_net(
    dim=2,
    noise_conditional=False,
    widths=(128, 128),
    activation="tanh",
    num_features=None,
    feature_scale=2.0,
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
    if num_features != 0 or isinstance(num_features, bool):
        checks.check_integer("num_features, unless it is None or 0,", num_features)
    seed = checks.check_seed(seed)
    initializers = _initializers("GlorotUniform", seed)
    x, log_noise_std = _energy_inputs((dim,), noise_conditional)
    first = RandomFourierFeatures(num_features, feature_scale, seed) if num_features else NoiseScaling(data_std)
    hidden = _append_level(first(x, log_noise_std), log_noise_std)
    hidden = _stack_dense_layers(hidden, widths, activation, initializers)
    return _energy_model("energy_net", x, log_noise_std, hidden, x, data_std, next(initializers))


def build_generator(  # noqa: D417
    latent_dim=2, dim=2, widths=(128, 128), activation="relu", num_features=64, feature_scale=2.0, data_std=2.0, seed=0
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


def build_image_energy_net(  # noqa: D417
    image_shape=(8, 8, 1),
    noise_conditional=False,
    filters=(32, 64),
    units=256,
    activation="silu",
    data_mean=0.0,
    data_std=0.6,
    seed=0,
):
    """Build the network of a DDE of images: convolutions of stride 2, dense layers, one scalar, plus a Gaussian.

    Args:
        image_shape: (height, width, channels).
        noise_conditional, activation, seed: as in ``build_energy_net``.
        filters: channels of the convolutions; each halves height and width.
        units: units of the two dense layers.
        data_mean: mean of the data, in data units: an image (height, width, channels), or a number.
        data_std: standard deviation of a pixel about its mean, roughly, in data units.

    Returns:
        A Functional ``keras.Model`` with output (batch, 1): the log density of the noisy images up to a constant.
    """
    image_shape, data_mean = checks.check_image_arguments(image_shape, data_mean)
    checks.check_sizes_and_scales({"units": units}, filters, {"data_std": data_std}, "filters")
    initializers = _initializers("GlorotUniform", checks.check_seed(seed))
    x, log_noise_std = _energy_inputs(image_shape, noise_conditional)
    centred = keras.layers.Rescaling(1.0, offset=(-data_mean).tolist(), dtype=_exact_type())(x)
    hidden = NoiseScaling(data_std)(centred, log_noise_std)
    for channels in filters:
        options = {"padding": "same", "activation": activation, "kernel_initializer": next(initializers)}
        hidden = keras.layers.Conv2D(channels, 3, 2, **options)(_append_level(hidden, log_noise_std))
    hidden = keras.layers.Flatten()(hidden)
    for _ in range(2):
        hidden = _stack_dense_layers(_append_level(hidden, log_noise_std), (units,), activation, initializers)
    return _energy_model("image_energy_net", x, log_noise_std, hidden, centred, data_std, next(initializers))


def build_image_generator(components, data_mean=0.0, widths=(512, 512, 512), filters=(), seed=0):  # noqa: D417
    """Build the generator of images: a linear map, corrected by dense layers and transposed convolutions with ReLU.

    It starts as the Gaussian of the widest directions of the data, y = data_mean + sum_i z_i components_i. From random
    weights, it would start narrow, grow in leaps that its density estimator cannot follow, and lose modes on the way.
    All of it is trained, the linear map too.

    Args:
        components: (latent_dim, height, width, channels): principal components of the data, each as long as the
            standard deviation along it. Height and width are multiples of 2^(number of filters).
        data_mean: as in ``build_image_energy_net``.
        widths, seed: as in ``build_energy_net``.
        filters: channels before each of the convolutions that double height and width; () is good for small images.

    Returns:
        A Functional ``keras.Model`` from (batch, latent_dim) to (batch, height, width, channels). Its pixels are not
        bounded: a saturated bound would have no gradient that leads back.
    """
    components = np.asarray(components)
    if components.ndim != 4 or not components.size or not np.isfinite(components).all():
        needed = "finite numbers of shape (latent_dim, height, width, channels)"
        raise ValueError(f"components must be {needed}, got shape {components.shape}")
    latent_dim, *image_shape = components.shape
    image_shape, data_mean = checks.check_image_arguments(image_shape, data_mean)
    checks.check_sizes_and_scales({}, widths, {})
    checks.check_sizes_and_scales({}, filters, {}, "filters")
    seed = checks.check_seed(seed)
    scale = 2 ** len(filters)
    if image_shape[0] % scale or image_shape[1] % scale:
        raise ValueError(f"{len(filters)} filters need a height and width divisible by {scale}, got {image_shape}")
    initializers, exact = _initializers("HeNormal", seed), _exact_type()
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    linear = keras.layers.Dense(math.prod(image_shape), dtype=exact)
    start = keras.layers.Reshape(image_shape, dtype=exact)(linear(z))
    # Weights, not an initializer: they are saved once.
    linear.set_weights([components.reshape(latent_dim, -1), np.broadcast_to(data_mean, image_shape).ravel()])
    last_options = {"kernel_initializer": keras.initializers.VarianceScaling(0.01, seed=seed), "dtype": exact}
    hidden = _stack_dense_layers(z, widths, "relu", initializers)
    if filters:
        double = functools.partial(keras.layers.Conv2DTranspose, kernel_size=4, strides=2, padding="same")
        smallest = (image_shape[0] // scale, image_shape[1] // scale, filters[0])
        hidden = _stack_dense_layers(hidden, (math.prod(smallest),), "relu", initializers)
        hidden = keras.layers.Reshape(smallest)(hidden)
        for channels in filters[1:]:
            hidden = double(channels, activation="relu", kernel_initializer=next(initializers))(hidden)
        correction = double(image_shape[2], **last_options)(hidden)
    else:
        pixels = keras.layers.Dense(math.prod(image_shape), **last_options)(hidden)
        correction = keras.layers.Reshape(image_shape, dtype=exact)(pixels)
    return keras.Model(z, keras.layers.Add(dtype=exact)([start, correction]), name="image_generator")


def _exact_type():
    """The type of points and log densities: with mixed precision, the hidden layers alone are coarse."""
    return keras.config.dtype_policy().variable_dtype


def _energy_inputs(event_shape, noise_conditional):
    """The inputs x and log(noise_std) of an energy network; the second is None in one of a single level."""
    x = keras.Input(event_shape, dtype=_exact_type(), name="x")
    return x, keras.Input((1,), dtype=_exact_type(), name="log_noise_std") if noise_conditional else None


def _energy_model(name, x, log_noise_std, hidden, centred, data_std, initializer):
    """The model whose output is one number from the hidden units, plus the log density of the Gaussian."""
    exact = _exact_type()
    # A bias here would be the log density's free constant: it has no gradient.
    correction = keras.layers.Dense(1, use_bias=False, kernel_initializer=initializer, dtype=exact)(hidden)
    base_measure = GaussianLogDensity(data_std)(centred, log_noise_std)
    log_density = keras.layers.Add(dtype=exact)([correction, base_measure])
    return keras.Model(x if log_noise_std is None else [x, log_noise_std], log_density, name=name)


def _append_level(hidden, log_noise_std):
    """Append the noise level (batch, 1), if there is one, to images, as one more channel, or to features."""
    if log_noise_std is None:
        return hidden
    if len(hidden.shape) == 4:
        height, width = hidden.shape[1:3]
        log_noise_std = keras.layers.RepeatVector(height * width)(log_noise_std)
        log_noise_std = keras.layers.Reshape((height, width, 1))(log_noise_std)
    return keras.layers.Concatenate()([hidden, log_noise_std])


def _stack_dense_layers(hidden, widths, activation, initializers):
    for width in widths:
        hidden = keras.layers.Dense(width, activation, kernel_initializer=next(initializers))(hidden)
    return hidden


def _initializers(name, seed):
    """Yield initializers with seeds of their own: equal shapes must not get equal weights."""
    initializer = getattr(keras.initializers, name)
    return (initializer(seed=10_000 * seed + offset) for offset in itertools.count(1))
