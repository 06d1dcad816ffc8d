"""Networks for points and for images: the layers they are made of, and their builders."""

import math

import keras
import numpy as np
import tensorflow as tf

from egm_dde import checks

_PACKAGE = "egm_dde"


@keras.saving.register_keras_serializable(_PACKAGE)
class RandomFourierFeatures(keras.layers.Layer):
    """Map x to [x, sin(x B), cos(x B)] with fixed random frequencies B ~ N(0, scale^2) (arXiv:2006.10739).

    Plain small networks learn the fine structure of a density very slowly; with these features they learn it fast.
    Given the noise level, each wave is damped the way noise n ~ N(0, I) blurs it,
    E sin((x + noise_std n) b) = exp(-noise_std^2 ||b||^2 / 2) sin(x b), so that the smooth densities of large noise
    are not made of fine waves that have to cancel.

    Args:
        num_features: number of frequencies; the output has ``dim + 2 * num_features`` columns.
        scale: standard deviation of the frequencies, in radians per data unit.
        seed: integer that fixes the frequencies.
    """

    def __init__(self, num_features=64, scale=1.0, seed=0, **kwargs):
        super().__init__(autocast=False, **kwargs)  # phases need all digits
        self.num_features = num_features
        self.scale = scale
        self.seed = seed

    def build(self, x_shape, log_noise_std_shape=None):
        self.frequencies = self.add_weight(
            shape=(x_shape[-1], self.num_features),
            initializer=keras.initializers.RandomNormal(stddev=self.scale, seed=self.seed),
            trainable=False,
            name="frequencies",
        )

    def call(self, x, log_noise_std=None):
        phases = keras.ops.matmul(x, self.frequencies)  # (batch, num_features)
        decay = None
        if log_noise_std is not None:
            squared_frequencies = keras.ops.sum(keras.ops.square(self.frequencies), axis=0)  # (num_features,)
            decay = 0.5 * keras.ops.exp(2.0 * log_noise_std) * squared_frequencies
        waves = _damped_waves(phases, decay)
        return keras.ops.cast(keras.ops.concatenate([x, *waves], axis=-1), self.compute_dtype)

    def compute_output_shape(self, x_shape, log_noise_std_shape=None):
        return (*x_shape[:-1], x_shape[-1] + 2 * self.num_features)

    def get_config(self):
        return {
            **super().get_config(),
            "num_features": self.num_features,
            "scale": self.scale,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(_PACKAGE)
class RandomCuts(keras.layers.Layer):
    """Map z to the sides of random hyperplanes that it lies on: sign(z W + b), unit columns of W, b ~ N(0, scale^2).

    A continuous generator leaves bridges between separate parts of the data, because it maps the connected latents to a
    connected set. One that has these features can tear along the hyperplanes, where it needs to.

    Args:
        num_cuts: number of hyperplanes.
        scale: standard deviation of their distances from the origin.
        seed: integer that fixes them.
    """

    def __init__(self, num_cuts=64, scale=0.7, seed=0, **kwargs):
        super().__init__(autocast=False, **kwargs)  # as for the frequencies
        self.num_cuts, self.scale, self.seed = num_cuts, scale, seed

    def build(self, z_shape):
        def add_normal(name, shape, std, seed):
            initializer = keras.initializers.RandomNormal(stddev=std, seed=seed)
            return self.add_weight(shape=shape, initializer=initializer, trainable=False, name=name)

        self.directions = add_normal("directions", (z_shape[-1], self.num_cuts), 1.0, self.seed)
        self.offsets = add_normal("offsets", (self.num_cuts,), self.scale, self.seed + 1)

    def call(self, z):
        directions = self.directions / keras.ops.norm(self.directions, axis=0)
        return keras.ops.cast(keras.ops.sign(keras.ops.matmul(z, directions) + self.offsets), self.compute_dtype)

    def compute_output_shape(self, z_shape):
        return (*z_shape[:-1], self.num_cuts)

    def get_config(self):
        return {**super().get_config(), "num_cuts": self.num_cuts, "scale": self.scale, "seed": self.seed}


@keras.saving.register_keras_serializable(_PACKAGE)
class NoiseScaling(keras.layers.Layer):
    """Divide points by sqrt(data_std^2 + noise_std^2), so that they are about as wide at every noise level.

    A network sees noise of 3 and noise of 0.1 on one scale then (arXiv:2206.00364, Section 5).

    Args:
        data_std: standard deviation of the data, roughly, in data units.
    """

    def __init__(self, data_std=1.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.data_std = data_std

    def call(self, x, log_noise_std=None):
        variance = _noisy_variance(self.data_std, log_noise_std, x.dtype)
        if log_noise_std is not None:
            variance = keras.ops.reshape(variance, (-1,) + (1,) * (x.ndim - 1))
        return keras.ops.cast(x / keras.ops.sqrt(variance), self.compute_dtype)

    def compute_output_shape(self, x_shape, log_noise_std_shape=None):
        return x_shape

    def get_config(self):
        return {**super().get_config(), "data_std": self.data_std}


@keras.saving.register_keras_serializable(_PACKAGE)
class GaussianLogDensity(keras.layers.Layer):
    """Log density of N(0, (data_std^2 + noise_std^2) I): the base measure that an energy network corrects.

    It makes exp(log density) integrable and gives points far from the data a score that leads home.

    Args:
        data_std: standard deviation of the data, roughly, in data units.
    """

    def __init__(self, data_std=2.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.data_std = data_std

    def call(self, x, log_noise_std=None):
        variance = _noisy_variance(self.data_std, log_noise_std, x.dtype)
        dim = math.prod(x.shape[1:])
        squared_norm = keras.ops.sum(keras.ops.square(keras.ops.reshape(x, (-1, dim))), axis=-1, keepdims=True)
        return -0.5 * (squared_norm / variance + dim * keras.ops.log(2.0 * math.pi * variance))

    def compute_output_shape(self, x_shape, log_noise_std_shape=None):
        return (x_shape[0], 1)

    def get_config(self):
        return {**super().get_config(), "data_std": self.data_std}


def _noisy_variance(data_std, log_noise_std, dtype):
    """data_std^2 + noise_std^2, (batch, 1); a scalar without a noise level."""
    variance = keras.ops.cast(data_std**2, dtype)
    return variance if log_noise_std is None else variance + keras.ops.exp(2.0 * log_noise_std)


def _damped_waves(phases, decay=None):
    """Sine and cosine of the phases, times exp(-decay).

    Each derivative of sine and cosine is again sine or cosine, so compute both once. TensorFlow would compute them anew
    in every derivative.
    """
    inputs = [phases] if decay is None else [phases, decay]
    sine, cosine = tf.sin(tf.stop_gradient(phases)), tf.cos(tf.stop_gradient(phases))
    if decay is not None:
        damping = tf.exp(-tf.stop_gradient(decay))
        sine, cosine = damping * sine, damping * cosine

    @tf.custom_gradient
    def depend_on(*inputs):
        def differentiate(sine_gradient, cosine_gradient):
            sine, cosine = depend_on(*inputs)
            along_phases = sine_gradient * cosine - cosine_gradient * sine
            along_decay = -(sine_gradient * sine + cosine_gradient * cosine)
            return [along_phases, along_decay][: len(inputs)]

        return (tf.identity(sine), tf.identity(cosine)), differentiate

    return depend_on(*inputs)


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

    Few waves fill a plane, but not a space of many dimensions. Without them, the points are divided by
    sqrt(data_std^2 + noise_std^2) instead, and three layers of 256 with "silu" learn well up to some 60 dimensions.

    Args:
        dim: number of coordinates of a point.
        noise_conditional: False for a network of one noise level, ``net(x)``; True for a network of a range of
            levels, ``net([x, log(noise_std)])`` with the second input of shape (batch, 1).
        widths: units of the dense layers.
        activation: a smooth activation; a piecewise linear one such as ReLU has a piecewise constant score.
        num_features: number of random Fourier features of the point, or 0; None is 64 in up to three dimensions,
            0 in more.
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
        checks.check_sizes_and_scales({"num_features, unless it is None or 0,": num_features}, (), {})
    seed = checks.check_seed(seed)
    initializers = _initializers("glorot_uniform", seed)
    exact = keras.config.dtype_policy().variable_dtype  # with mixed precision, the hidden layers alone are coarse
    x = keras.Input((dim,), dtype=exact, name="x")
    log_noise_std = keras.Input((1,), dtype=exact, name="log_noise_std") if noise_conditional else None
    if num_features:
        hidden = RandomFourierFeatures(num_features, feature_scale, seed)(x, log_noise_std)
    else:
        hidden = NoiseScaling(data_std)(x, log_noise_std)
    hidden = _stack_dense_layers(_append_level(hidden, log_noise_std), widths, activation, initializers)
    log_density = _correct_base_measure(hidden, x, log_noise_std, data_std, next(initializers))
    inputs = [x, log_noise_std] if noise_conditional else x
    return keras.Model(inputs, log_density, name="energy_net")


def build_generator(
    latent_dim=2,
    dim=2,
    widths=(128, 128),
    activation="relu",
    num_features=64,
    feature_scale=2.0,
    num_cuts=64,
    data_std=2.0,
    seed=0,
):
    """Build the generator: random Fourier features of a standard normal latent, dense layers, a point.

    If the latent has as many coordinates as the point, the layers correct the map ``data_std * z``: the generator
    starts as a Gaussian about as wide as the data, without folds, and moves every point to data near by.

    Args:
        latent_dim: number of coordinates of the latent z ~ N(0, I).
        dim: number of coordinates of a generated point.
        widths: units of the dense layers.
        activation: any activation; the generator needs no smooth derivative.
        num_features: number of random Fourier features of the latent.
        feature_scale: standard deviation of their frequencies.
        num_cuts: number of random hyperplanes along which the generator can tear, or 0 for a continuous one.
        data_std: standard deviation of the data, roughly, in data units.
        seed: integer that fixes the initial weights.

    Returns:
        A Functional ``keras.Model`` from (batch, latent_dim) to (batch, dim).
    """
    checks.check_sizes_and_scales(
        {"latent_dim": latent_dim, "dim": dim, "num_features": num_features},
        widths,
        {"feature_scale": feature_scale, "data_std": data_std},
    )
    seed = checks.check_seed(seed)
    initializers = _initializers("he_normal" if activation == "relu" else "glorot_uniform", seed)
    exact = keras.config.dtype_policy().variable_dtype
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    hidden = RandomFourierFeatures(num_features, feature_scale, seed)(z)
    if num_cuts:
        hidden = keras.layers.Concatenate()([hidden, RandomCuts(num_cuts, seed=seed + 1)(z)])
    hidden = _stack_dense_layers(hidden, widths, activation, initializers)
    if latent_dim == dim:
        small = keras.initializers.VarianceScaling(0.01, seed=seed)
        correction = keras.layers.Dense(dim, kernel_initializer=small, dtype=exact)(hidden)
        y = keras.layers.Add(dtype=exact)([keras.layers.Rescaling(data_std, dtype=exact)(z), correction])
    else:
        y = keras.layers.Dense(dim, kernel_initializer=next(initializers), dtype=exact)(hidden)
    return keras.Model(z, y, name="generator")


def build_image_energy_net(
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
        noise_conditional: as in ``build_energy_net``.
        filters: channels of the convolutions; each halves height and width.
        units: units of the two dense layers.
        activation: a smooth activation.
        data_mean: mean of the data, in data units: an image (height, width, channels), or a number.
        data_std: standard deviation of a pixel about its mean, roughly, in data units.
        seed: integer that fixes the initial weights.

    Returns:
        A Functional ``keras.Model`` with output (batch, 1): the log density of the noisy images up to a constant.
    """
    image_shape, data_mean = checks.check_image_arguments(image_shape, data_mean)
    checks.check_sizes_and_scales({"units": units}, filters, {"data_std": data_std}, "filters")
    seed = checks.check_seed(seed)
    initializers = _initializers("glorot_uniform", seed)
    exact = keras.config.dtype_policy().variable_dtype
    x = keras.Input(image_shape, dtype=exact, name="x")
    log_noise_std = keras.Input((1,), dtype=exact, name="log_noise_std") if noise_conditional else None
    centred = keras.layers.Rescaling(1.0, offset=(-data_mean).tolist(), dtype=exact)(x)
    hidden = NoiseScaling(data_std)(centred, log_noise_std)
    for size in filters:
        convolution = keras.layers.Conv2D(
            size, 3, 2, padding="same", activation=activation, kernel_initializer=next(initializers)
        )
        hidden = convolution(_append_level(hidden, log_noise_std))
    hidden = keras.layers.Flatten()(hidden)
    for _ in range(2):
        hidden = _stack_dense_layers(_append_level(hidden, log_noise_std), (units,), activation, initializers)
    log_density = _correct_base_measure(hidden, centred, log_noise_std, data_std, next(initializers))
    inputs = [x, log_noise_std] if noise_conditional else x
    return keras.Model(inputs, log_density, name="image_energy_net")


def build_image_generator(components, data_mean=0.0, widths=(512, 512, 512), filters=(), seed=0):
    """Build the generator of images: a linear map, corrected by dense layers and transposed convolutions with ReLU.

    It starts as the Gaussian of the widest directions of the data, y = data_mean + sum_i z_i components_i: as diverse
    as they are, and with no point far away. From random weights, it would start narrow, grow in leaps that its density
    estimator cannot follow, and lose modes on the way. All of it is trained, the linear map too.

    Args:
        components: (latent_dim, height, width, channels): principal components of the data, each as long as the
            standard deviation along it. Height and width are multiples of 2^(number of filters).
        data_mean: mean of the data, as in ``build_image_energy_net``.
        widths: units of the dense layers.
        filters: channels before each of the convolutions, each of which doubles height and width; () is good for
            small images.
        seed: integer that fixes the initial weights.

    Returns:
        A Functional ``keras.Model`` from (batch, latent_dim) to (batch, height, width, channels). Its pixels are not
        bounded: a saturated bound would have no gradient that leads back.
    """
    components = np.asarray(components)
    if components.ndim != 4 or not components.size or not np.isfinite(components).all():
        raise ValueError(
            "components must be finite numbers of shape (latent_dim, height, width, channels), "
            f"got shape {components.shape}"
        )
    latent_dim, *image_shape = components.shape
    image_shape, data_mean = checks.check_image_arguments(image_shape, data_mean)
    checks.check_sizes_and_scales({}, widths, {})
    checks.check_sizes_and_scales({}, filters, {}, "filters")
    seed = checks.check_seed(seed)
    scale = 2 ** len(filters)
    if image_shape[0] % scale or image_shape[1] % scale:
        raise ValueError(f"{len(filters)} filters need a height and width divisible by {scale}, got {image_shape}")
    initializers = _initializers("he_normal", seed)
    exact = keras.config.dtype_policy().variable_dtype
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    linear = keras.layers.Dense(math.prod(image_shape), dtype=exact)
    start = keras.layers.Reshape(image_shape, dtype=exact)(linear(z))
    linear.set_weights(
        [components.reshape(latent_dim, -1), np.broadcast_to(data_mean, image_shape).reshape(-1)]
    )  # weights, not an initializer: they are saved once
    small = keras.initializers.VarianceScaling(0.01, seed=seed)
    hidden = _stack_dense_layers(z, widths, "relu", initializers)
    if filters:
        smallest = (image_shape[0] // scale, image_shape[1] // scale, filters[0])
        hidden = _stack_dense_layers(hidden, (math.prod(smallest),), "relu", initializers)
        hidden = keras.layers.Reshape(smallest)(hidden)
        for channels in filters[1:]:
            hidden = keras.layers.Conv2DTranspose(
                channels, 4, 2, padding="same", activation="relu", kernel_initializer=next(initializers)
            )(hidden)
        correction = keras.layers.Conv2DTranspose(
            image_shape[2], 4, 2, padding="same", kernel_initializer=small, dtype=exact
        )(hidden)
    else:
        pixels = keras.layers.Dense(math.prod(image_shape), kernel_initializer=small, dtype=exact)(hidden)
        correction = keras.layers.Reshape(image_shape, dtype=exact)(pixels)
    return keras.Model(z, keras.layers.Add(dtype=exact)([start, correction]), name="image_generator")


def _correct_base_measure(hidden, x, log_noise_std, data_std, initializer):
    """One number from the hidden units, plus the log density of the Gaussian: the output of an energy network."""
    exact = keras.config.dtype_policy().variable_dtype
    # A bias here would be the log density's free constant: it has no gradient.
    correction = keras.layers.Dense(1, use_bias=False, kernel_initializer=initializer, dtype=exact)(hidden)
    return keras.layers.Add(dtype=exact)([correction, GaussianLogDensity(data_std)(x, log_noise_std)])


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
    config = keras.saving.serialize_keras_object(keras.initializers.get(name))
    for offset in range(1, 10_000):
        config["config"]["seed"] = 10_000 * seed + offset
        yield keras.saving.deserialize_keras_object(config)
