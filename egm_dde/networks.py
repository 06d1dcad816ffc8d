"""Networks for points: the layers they are made of, and their builders."""

import itertools
import math

import keras
import numpy as np

from egm_dde import checks

register = keras.saving.register_keras_serializable("egm_dde")


class ExactLayer(keras.layers.Layer):
    """A layer that meets points with all their digits, under any dtype policy, and saves its ``options``."""

    options = ()

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **{"dtype": exact_type()} | kwargs)

    def add_constants(self, initializer="ones", **shapes):
        """Add weights that are not trained, by name."""
        for name, shape in shapes.items():
            setattr(self, name, self.add_weight(shape, initializer, trainable=False, name=name))

    def get_config(self):
        return {**super().get_config(), **{name: getattr(self, name) for name in self.options}}


class DataLayer(ExactLayer):
    """A layer that knows the clean data, roughly: their standard deviation (or None) and mean, for each coordinate."""

    options = ("data_std", "data_mean")

    def __init__(self, data_std=None, data_mean=0.0, **kwargs):
        super().__init__(**kwargs)
        self.data_std, self.data_mean = data_std, data_mean

    def centre(self, x):
        """Subtract the mean, before anything else: far from zero, every other operation would lose digits."""
        return x if self.data_mean == 0.0 else x - keras.ops.convert_to_tensor(self.data_mean, x.dtype)

    def noisy_variance(self, x, log_noise_std):
        """data_std^2 + noise_std^2, (batch, 1) or (batch, d); without a noise level, data_std^2 alone."""
        variance = keras.ops.convert_to_tensor(np.square(self.data_std), x.dtype)
        return variance if log_noise_std is None else variance + keras.ops.exp(2.0 * log_noise_std)


@register
class RandomFourierFeatures(DataLayer):
    """Map u = (x - data_mean) / data_std to [u, sin(u B), cos(u B)], random B ~ N(0, scale^2) (arXiv:2006.10739).

    Small networks learn the fine structure of a density fast with them. Given the noise level, each wave is damped the
    way noise n ~ N(0, I) blurs it, E sin((x + noise_std n) b) = exp(-noise_std^2 ||b||^2 / 2) sin(x b), so that the
    smooth densities of large noise are not made of fine waves that have to cancel.

    Args:
        num_features: number of frequencies; the output has ``dim + 2 * num_features`` columns.
        scale: standard deviation of the frequencies, in radians per data_std, or without one per data unit.
        seed: integer that fixes the frequencies.
        **kwargs: ``data_std`` and ``data_mean``, in data units.
    """

    options = ("num_features", "scale", "seed", *DataLayer.options)

    def __init__(self, num_features=64, scale=1.0, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.num_features, self.scale, self.seed = num_features, scale, seed

    def build(self, x_shape, log_noise_std_shape=None):
        normal = keras.initializers.RandomNormal(stddev=self.scale, seed=self.seed)
        self.add_constants(normal, frequencies=(x_shape[-1], self.num_features))

    def call(self, x, log_noise_std=None):
        x, frequencies = self.centre(x), self.frequencies
        if self.data_std is not None:
            data_std = keras.ops.convert_to_tensor(self.data_std, x.dtype)
            x, frequencies = x / data_std, self.frequencies / keras.ops.reshape(data_std, (-1, 1))  # per data unit
        phases = keras.ops.matmul(x, self.frequencies)  # (batch, num_features)
        waves = [keras.ops.sin(phases), keras.ops.cos(phases)]
        if log_noise_std is not None:
            squared_frequencies = keras.ops.sum(keras.ops.square(frequencies), axis=0)  # (num_features,)
            damping = keras.ops.exp(-0.5 * keras.ops.exp(2.0 * log_noise_std) * squared_frequencies)
            waves = [damping * wave for wave in waves]
        return keras.ops.concatenate([x, *waves], axis=-1)


@register
class SquareWaves(RandomFourierFeatures):
    """Map z to sign(sin(z B)), random B ~ N(0, scale^2): features that jump."""

    def call(self, x, log_noise_std=None):
        return keras.ops.sign(keras.ops.sin(keras.ops.matmul(x, self.frequencies)))


@register
class NoiseScaling(DataLayer):
    """Divide centred points by sqrt(data_std^2 + noise_std^2), so that they are about as wide at every noise level.

    A network sees noise of 3 and noise of 0.1 on one scale then (arXiv:2206.00364, Section 5).
    """

    def call(self, x, log_noise_std=None):
        return self.centre(x) / keras.ops.sqrt(self.noisy_variance(x, log_noise_std))


@register
class DataScaling(DataLayer):
    """Map u to data_mean + data_std * u: from standard units to those of the data."""

    def call(self, u):
        scale, offset = (keras.ops.convert_to_tensor(each, u.dtype) for each in (self.data_std, self.data_mean))
        return scale * u + offset


@register
class GaussianLogDensity(DataLayer):
    """Log density of N(0, (data_std^2 + noise_std^2) I): the base measure that an energy network corrects.

    It makes exp(log density) integrable and gives points far from the data a score that leads home.
    """

    def call(self, x, log_noise_std=None):
        return keras.ops.sum(log_normal(x, 0.0, self.noisy_variance(x, log_noise_std)), axis=-1, keepdims=True)


@register
class CorrelatedGaussian(ExactLayer):
    """Log density (batch, 1) of noisy points, if the clean ones were Gaussian with the mean and covariance of the data.

    ``components`` (d, d) are the principal components, in columns, and ``variances`` (d,) those along them.
    """

    def build(self, x_shape, log_noise_std_shape=None):
        dim = math.prod(x_shape[1:])
        self.add_constants(mean=(dim,), components=(dim, dim), variances=(dim,))

    def call(self, x, log_noise_std=None):
        flat = keras.ops.reshape(x, (-1, self.mean.shape[0]))
        coordinates = keras.ops.matmul(flat - self.mean, self.components)
        variances = self.variances if log_noise_std is None else self.variances + keras.ops.exp(2.0 * log_noise_std)
        return keras.ops.sum(log_normal(coordinates, 0.0, variances), axis=-1, keepdims=True)


def build_energy_net(
    dim=None,
    noise_conditional=False,
    widths=(128, 128),
    activation="tanh",
    num_features=None,
    feature_scale=6.0,
    data_std=None,
    seed=0,
    data=None,
):
    """Build the network of a DDE: random Fourier features, dense layers, one scalar, plus a Gaussian base measure.

    It is built for its data: give them as ``data``, in whatever units. They are centred and scaled within the network,
    and the base measure has their mean and covariance, exactly at every noise level of a range. (A network of one level
    does not know it; there, the base measure has at least a tenth of the variance in each direction.)

    Few waves fill a plane, but not a space of many dimensions. There, the points are divided by
    sqrt(data_std^2 + noise_std^2) instead, and three layers of 256 with "silu" learn well up to some 60 dimensions.

    Args:
        dim: number of coordinates of a point; None is that of ``data``, or 2.
        noise_conditional: False for a network of one noise level, ``net(x)``; True for a network of a range of
            levels, ``net([x, log(noise_std)])`` with the second input of shape (batch, 1).
        widths: units of the dense layers.
        activation: a smooth activation; a piecewise linear one such as ReLU has a piecewise constant score.
        num_features: number of random Fourier features of the point; None is 64 in up to three dimensions, 0 in more.
        feature_scale: standard deviation of their frequencies, in radians per standard deviation of the data.
        data_std: without ``data``, the standard deviation of data with mean 0, in data units; None is 2.
        seed: integer that fixes the initial weights.
        data: points (n, dim) to train on, or some of them.

    Returns a Functional ``keras.Model`` with output (batch, 1): the log density of the noisy data up to a constant.
    """
    dim, data_std, known, correlation = _describe_data(dim, data_std, data)
    checks.check_sizes_and_scales({"dim": dim}, widths, {"feature_scale": feature_scale})
    if num_features is None:
        num_features = 64 if dim <= 3 else 0
    checks.check_integer("num_features, unless it is None,", num_features, 0)
    seed = checks.check_seed(seed)
    initial = initializers("GlorotUniform", seed)
    x = keras.Input((dim,), dtype=exact_type(), name="x")
    log_noise_std = keras.Input((1,), dtype=exact_type(), name="log_noise_std") if noise_conditional else None
    base_measure = GaussianLogDensity(data_std) if data is None else CorrelatedGaussian()
    if data is None:  # the points themselves are of the right size
        feature_scale /= data_std
    if num_features:
        hidden = RandomFourierFeatures(num_features, feature_scale, seed, **known)(x, log_noise_std)
    else:
        hidden = NoiseScaling(**{"data_std": data_std} | known)(x, log_noise_std)
    if noise_conditional:
        level = log_noise_std if data is None else log_noise_std - math.log(data_std)
        hidden = keras.layers.Concatenate()([hidden, level])
    hidden = stack_dense_layers(hidden, widths, activation, initial)
    net = energy_model("energy_net", x, log_noise_std, hidden, base_measure(x, log_noise_std), next(initial))
    if data is not None:
        if not noise_conditional:
            variances, components = np.linalg.eigh(correlation)
            correlation = components * np.maximum(variances, 0.1 * variances.max()) @ components.T
        variances, components = np.linalg.eigh(correlation * np.outer(known["data_std"], known["data_std"]))
        base_measure.set_weights([np.array(known["data_mean"]), components, np.maximum(variances, 0.0)])
    return net


def build_generator(  # noqa: D417
    latent_dim=2,
    dim=None,
    widths=(128, 128),
    activation="relu",
    num_features=64,
    feature_scale=3.0,
    data_std=None,
    seed=0,
    data=None,
    num_jumps=0,
):
    """Build the generator: random Fourier features of a standard normal latent, dense layers, a point.

    If the latent has as many coordinates as the point, the layers correct a linear map of it: the generator starts as a
    Gaussian as wide as the data (with ``data``, of their mean and covariance), without folds, and moves every point to
    data near by.

    Args:
        latent_dim: number of coordinates of the latent z ~ N(0, I).
        dim, widths, data_std, seed, data: as in ``build_energy_net``.
        activation: any activation; the generator needs no smooth derivative.
        num_features: number of random Fourier features of the latent.
        feature_scale: standard deviation of their frequencies, in radians per standard deviation of the latent.
        num_jumps: number of features of the latent that jump, as ``SquareWaves``. A map that is continuous leaves
            bridges between separate parts of the data (arXiv:2206.14476); with 16, it can tear.

    Returns a Functional ``keras.Model`` from (batch, latent_dim) to (batch, dim).
    """
    dim, data_std, known, correlation = _describe_data(dim, data_std, data)
    sizes = {"latent_dim": latent_dim, "dim": dim, "num_features": num_features}
    checks.check_sizes_and_scales(sizes, widths, {"feature_scale": feature_scale})
    checks.check_integer("num_jumps", num_jumps, 0)
    seed, exact = checks.check_seed(seed), exact_type()
    initial = initializers("HeNormal" if activation == "relu" else "GlorotUniform", seed)
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    hidden = RandomFourierFeatures(num_features, feature_scale, seed)(z)
    if num_jumps:
        hidden = keras.layers.Concatenate(dtype=exact)([hidden, SquareWaves(num_jumps, 1.0, seed)(z)])
    hidden = stack_dense_layers(hidden, widths, activation, initial)
    is_correction = latent_dim == dim
    last = keras.initializers.VarianceScaling(0.01, seed=seed) if is_correction else next(initial)
    y = keras.layers.Dense(dim, kernel_initializer=last, dtype=exact)(hidden)
    if data is None and is_correction:
        y = keras.layers.Add(dtype=exact)([DataScaling(data_std)(z), y])
    elif data is not None:
        if is_correction:
            start = keras.layers.Dense(dim, use_bias=False, trainable=False, dtype=exact)
            y = keras.layers.Add(dtype=exact)([start(z), y])
            variances, components = np.linalg.eigh(correlation)
            start.set_weights([components * np.sqrt(np.maximum(variances, 0.0)) @ components.T])
        y = DataScaling(**known)(y)
    return keras.Model(z, y, name="generator")


def _describe_data(dim, data_std, data):
    """Number of coordinates, one width for all of them; of data, what a ``DataLayer`` knows, and correlation (d, d)."""
    if data is None:
        data_std = 2.0 if data_std is None else checks.check_positive("data_std", data_std)
        return 2 if dim is None else checks.check_integer("dim", dim), data_std, {}, None
    points = checks.check_points("data", data, (dim,), "float64")
    if data_std is not None:
        raise ValueError(f"data_std is that of data, where data are given; got {data_std!r}")
    mean, std = points.mean(axis=0), points.std(axis=0)
    varies = std > 1e-7 * abs(mean)  # and not by rounding errors alone
    if not varies.any():
        raise ValueError(f"data must be points that differ, got {len(points)} alike")
    width = np.exp(np.log(std[varies]).mean())
    std = np.where(varies, std, width)  # a constant column is as wide as the others
    scaled = (points - mean) / std
    known = {"data_mean": mean.tolist(), "data_std": std.tolist()}
    return points.shape[1], float(width), known, scaled.T @ scaled / len(points)


def log_normal(x, mean, variance):
    """Log density of each x in N(mean, variance)."""
    return -0.5 * (keras.ops.square(x - mean) / variance + keras.ops.log(2.0 * math.pi * variance))


def exact_type():
    """The type of points and log densities: with mixed precision, the hidden layers alone are coarse."""
    return keras.config.dtype_policy().variable_dtype


def energy_model(name, x, log_noise_std, hidden, base_measure, initializer):
    """The model whose output is one number from the hidden units, plus the log density of the base measure."""
    exact = exact_type()
    # A bias here would be the log density's free constant: it has no gradient.
    correction = keras.layers.Dense(1, use_bias=False, kernel_initializer=initializer, dtype=exact)(hidden)
    log_density = keras.layers.Add(dtype=exact)([correction, base_measure])
    return keras.Model(x if log_noise_std is None else [x, log_noise_std], log_density, name=name)


def stack_dense_layers(hidden, widths, activation, initial):
    """Dense layers of these widths; ``initial`` yields the initializers of their kernels."""
    for width in widths:
        hidden = keras.layers.Dense(width, activation, kernel_initializer=next(initial))(hidden)
    return hidden


def initializers(name, seed):
    """Yield initializers with seeds of their own: equal shapes must not get equal weights."""
    initializer = getattr(keras.initializers, name)
    return (initializer(seed=10_000 * seed + offset) for offset in itertools.count(1))
