"""Denoising density estimators (DDEs) and the energy-based generative models (EGMs) built on them.

Everything that has weights lives here: network builders for points and for images, ``DDE`` and ``EGM``
(arXiv:2001.02728).

One sign convention throughout: a network outputs a **log density** up to a constant (the energy is its negative),
the gradient of the log density with respect to the point is the **score**, and at ``x + noise_std * noise`` with
standard normal ``noise`` the regression target of the score is ``-noise / noise_std``.
"""

import math
import numbers
import random
import warnings

import keras
import numpy as np
import tensorflow as tf

from egm_dde.training import ResumableModel, check_finite, check_positive_integer, format_shape

_PACKAGE = "egm_dde"

# Every draw is counter-based: a pure function of (seed, purpose, step), so that a resumed run repeats exactly the draws
# of an uninterrupted one, and several devices share out the draws of one. Each purpose and step has a stream of random
# numbers of its own ...
_TRAIN, _EVALUATE, _GENERATOR, _REAL, _FAKE, _SAMPLE, _LANGEVIN, _ANNEALED_LANGEVIN, _PARTITION = range(9)
# ... and these are places in a stream, too far apart to overlap.
_NOISE, _LEVELS, _LATENTS, _ORDER, _ACCEPTANCE = (part << 61 for part in range(5))


# ---------------------------------------------------------------------------------------------- networks


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

    Raises:
        ValueError: for sizes that are not integers of at least 1, or scales that are not positive and finite.
    """
    _check_sizes_and_scales({"dim": dim}, widths, {"feature_scale": feature_scale, "data_std": data_std})
    if num_features is None:
        num_features = 64 if dim <= 3 else 0
    if num_features != 0 or isinstance(num_features, bool):
        _check_sizes_and_scales({"num_features, unless it is None or 0,": num_features}, (), {})
    seed = _check_seed(seed)
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
        data_std: standard deviation of the data, roughly, in data units.
        seed: integer that fixes the initial weights.

    Returns:
        A Functional ``keras.Model`` from (batch, latent_dim) to (batch, dim).

    Raises:
        ValueError: for sizes that are not integers of at least 1, or scales that are not positive and finite.
    """
    _check_sizes_and_scales(
        {"latent_dim": latent_dim, "dim": dim, "num_features": num_features},
        widths,
        {"feature_scale": feature_scale, "data_std": data_std},
    )
    seed = _check_seed(seed)
    initializers = _initializers("he_normal" if activation == "relu" else "glorot_uniform", seed)
    exact = keras.config.dtype_policy().variable_dtype
    z = keras.Input((latent_dim,), dtype=exact, name="z")
    hidden = RandomFourierFeatures(num_features, feature_scale, seed)(z)
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

    Raises:
        ValueError: for sizes that are not integers of at least 1, a mean of another shape or not finite, or a
            ``data_std`` that is not positive and finite.
    """
    image_shape, data_mean, seed = _check_image_arguments(image_shape, filters, (units,), data_mean, data_std, seed)
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

    Raises:
        ValueError: for components of another shape or not finite, images that cannot be halved as often as ``filters``
            ask, and as in ``build_image_energy_net``.
    """
    components = np.asarray(components)
    if components.ndim != 4 or not components.size or not np.isfinite(components).all():
        raise ValueError(
            "components must be finite numbers of shape (latent_dim, height, width, channels), "
            f"got shape {components.shape}"
        )
    latent_dim, *image_shape = components.shape
    image_shape, data_mean, seed = _check_image_arguments(image_shape, filters, widths, data_mean, 1.0, seed)
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


def _check_image_arguments(image_shape, filters, widths, data_mean, data_std, seed):
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {image_shape!r}")
    if not isinstance(filters, (tuple, list)):
        raise ValueError(f"filters must be a sequence of integers, got {filters!r}")
    for name, sizes in (("image_shape", image_shape), ("filters", filters)):
        for size in sizes:
            check_positive_integer(f"each of {name}", size)
    _check_sizes_and_scales({}, widths, {"data_std": data_std})
    data_mean = np.asarray(data_mean)
    if data_mean.dtype.kind not in "fiu" or not np.isfinite(data_mean).all():
        raise ValueError(f"data_mean must be made of finite numbers, got {data_mean!r}")
    if data_mean.shape not in ((), tuple(image_shape)):
        raise ValueError(f"data_mean must be a number or of shape {tuple(image_shape)}, got shape {data_mean.shape}")
    return tuple(int(size) for size in image_shape), data_mean.astype(float), _check_seed(seed)


def _check_sizes_and_scales(sizes, widths, scales):
    if not isinstance(widths, (tuple, list)):
        raise ValueError(f"widths must be a sequence of integers, got {widths!r}")
    for name, size in [*sizes.items(), *(("each of widths", width) for width in widths)]:
        check_positive_integer(name, size)
    for name, scale in scales.items():
        if not _is_finite_number(scale) or scale <= 0:
            raise ValueError(f"{name} must be a positive finite number, got {scale!r}")


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


# ---------------------------------------------------------------------------------------------- DDE


@keras.saving.register_keras_serializable(_PACKAGE)
class DDE(ResumableModel):
    """Denoising density estimator: a scalar network whose output is the log density of the noisy data.

    For data x and y = x + noise_std * noise, noise ~ N(0, I), it minimises (arXiv:2001.02728, Eq. 5, in noise units)

        E ||noise_std * grad_y f(y) + noise||^2 / d,

    whose minimiser is f = log p~ + constant, with p~ = p * N(0, noise_std^2 I) the density of y. A loss of 1 means
    "learned nothing"; the unavoidable part is 1 - noise_std^2 * J / d, with J = E ||grad log p~||^2 the Fisher
    information of p~.

    The noise is one guess at where y came from; other points of the batch may have been its source, too. What meets
    the network is the average of the noise over all of them, weighted by their probability: the loss has the same
    expectation, but its gradient scatters less (Rao-Blackwell; such targets are from arXiv:2302.00670). It helps most
    where noise blurs points of a batch into each other, so prefer large batches.

    With a range ``noise_std=(low, high)`` one network covers all levels: noise_std is drawn log-uniformly for each
    point, and dual score matching (arXiv:2506.05310) also fits the derivative along the noise level,

        E (d f(y, noise_std) / d log(noise_std) - (||noise||^2 - d))^2 / (2 d),

    which ties all levels to one constant and so gets the relative mass of far modes right. This term is 1, too, where
    nothing is learned, so with ``dual_weight=1`` the loss starts near 2.

    The noise is added here: ``dde.compile(); dde.fit(x)`` takes the clean data as an array, a ``tf.data.Dataset`` or
    a ``keras.utils.PyDataset``. It is a function of ``seed`` and the number of steps made, so that equal seeds give
    equal runs.

    Args:
        net: ``keras.Model`` from (batch, *event) to (batch, 1), such as ``build_energy_net()``; for a range of
            noise levels from [(batch, *event), (batch, 1)], the second input being log(noise_std).
        noise_std: standard deviation of the noise, in data units: a positive number, or a pair (low, high).
        dual_weight: weight of the derivative along the noise level in the loss; used with a range only.
        seed: integer that fixes all noise; None draws one from Python's ``random`` (``keras.utils.set_random_seed``).

    Raises:
        ValueError: for a ``net`` with more than one output, other inputs, batch normalization or half precision
            (float16), or a ``noise_std``, ``dual_weight`` or ``seed`` that is not as above.

    Warns:
        UserWarning: for piecewise linear activations such as ReLU, whose score is piecewise constant.
    """

    def __init__(self, net, noise_std=0.1, dual_weight=1.0, seed=None, **kwargs):
        # The layers of the network cast by themselves; points, noise and losses stay exact.
        super().__init__(autocast=False, **kwargs)
        self.noise_std, self.noise_range = _check_noise_std(noise_std)
        _check_network("net", net, num_inputs=1 + self.noise_conditional)
        _check_layers(net)
        self.net = net
        if not _is_finite_number(dual_weight) or dual_weight < 0:
            raise ValueError(f"dual_weight must be a finite number of at least 0, got {dual_weight!r}")
        self.dual_weight = float(dual_weight)
        self.seed = _check_seed(seed)
        self.loss_tracker = keras.metrics.Mean("loss")
        if net.built:
            if getattr(net, "output_shape", None) is not None:
                _check_scalar_output(net.output_shape)
            self.built = True

    @property
    def num_steps(self):
        """Number of training steps made."""
        return _count_steps(self.optimizer) if self.compiled else 0

    @property
    def event_shape(self):
        """Shape of a point; None while the network does not know it."""
        shape = _input_shape(self.net)
        return None if shape is None else shape[1:]

    @property
    def smallest_noise_std(self):
        """The lowest level, in data units."""
        return self.noise_range[0]

    @property
    def noise_conditional(self):
        """Whether the network covers a range of noise levels."""
        return self.noise_range[0] < self.noise_range[1]

    def call(self, x, noise_std=None):
        """Evaluate log density and score.

        Args:
            x: points (batch, *event), in data units.
            noise_std: for a DDE of a range of levels, the level (by keyword): a number or one a point (batch,); None is
                the lowest.

        Returns:
            log_density (batch, 1) up to a constant, and score (batch, *event), its gradient, in 1 / data units.
        """
        x = self._as_points(x)
        log_density, score, _ = self._differentiate(x, self._log_noise_std(x, noise_std))
        return log_density, score

    def log_density(self, x, noise_std=None):
        """Log density (batch, 1) of the noisy data up to a constant, the same for all levels; see ``call``."""
        x = self._as_points(x)
        return self._evaluate(x, self._log_noise_std(x, noise_std))

    def score(self, x, noise_std=None):
        """Gradient (batch, *event) of the log density with respect to x; see ``call``."""
        return self(self._as_points(x), noise_std=noise_std)[1]

    def denoise(self, noisy_x, noise_std=None):
        """Posterior mean of the clean data, noisy_x + noise_std^2 * score(noisy_x) (Miyasawa 1961, Robbins 1956).

        Args:
            noisy_x: points (batch, *event), in data units.
            noise_std: the noise in them; see ``call``.

        Returns:
            Tensor (batch, *event), in data units.
        """
        noisy_x = self._as_points(noisy_x)
        log_noise_std = self._log_noise_std(noisy_x, noise_std)
        _, score, _ = self._differentiate(noisy_x, log_noise_std)
        return noisy_x + _per_event(tf.exp(2.0 * log_noise_std), noisy_x) * score

    def add_noise(self, x, key, part=None):
        """Draw a noise level and noise for each point.

        Args:
            x: clean points (batch, *event).
            key: uint64 tensor (2,), the seed and the stream of the draw.
            part: ``_Part`` of the batch that ``x`` is; None is all of it.

        Returns:
            noisy_x (batch, *event), noise (batch, *event) in noise units, and log_noise_std (batch, 1).
        """
        batch_size = tf.shape(x)[0] if part is None else part.whole_size
        noise = _draw_normal(tf.concat([[batch_size], tf.shape(x)[1:]], axis=0), key, _NOISE, x.dtype)
        low, high = (math.log(level) for level in self.noise_range)
        if self.noise_conditional:
            # Stratified: one level in each of batch_size equal parts of the range, for less variance. The parts are
            # shifted around by a random offset, so that the level does not depend on the place in the batch.
            offset = _draw_uniform([], key, _LEVELS, x.dtype)
            steps = tf.range(batch_size, dtype=x.dtype) / tf.cast(batch_size, x.dtype)
            log_noise_std = low + (high - low) * tf.math.floormod(steps + offset, 1.0)[:, None]
        else:
            log_noise_std = tf.fill([batch_size, 1], tf.cast(low, x.dtype))
        if part is not None:
            noise, log_noise_std = part.take(noise), part.take(log_noise_std)
        return x + _per_event(tf.exp(log_noise_std), x) * noise, noise, log_noise_std

    def denoising_loss(self, x, key, training=False):
        """The training loss on a batch, in noise units.

        Args:
            x: clean points (batch, *event).
            key: uint64 tensor (2,), the seed and the stream of the noise.
            training: whether layers such as dropout behave as in training.

        Returns:
            Scalar tensor; its minimum is reached where the network is the log density of the noisy data.
        """
        part = _Part(tf.shape(x)[0])
        x = part.gather(x)
        noisy_x, noise, log_noise_std = self.add_noise(x, key)
        targets = _average_over_sources(x, noisy_x, noise, log_noise_std)
        noisy_x, noise, log_noise_std, mean_noise, squared_norm, mean_squared_norm = (
            part.take(values) for values in (noisy_x, noise, log_noise_std, *targets)
        )
        _, score, level_derivative = self._differentiate(noisy_x, log_noise_std, training)
        scaled_score = _per_event(tf.exp(log_noise_std), x) * score
        loss = _mean(_expected_square(scaled_score, -noise, -mean_noise))
        if self.noise_conditional and self.dual_weight > 0:
            dim = math.prod(x.shape[1:])
            squares = _expected_square(level_derivative, squared_norm - dim, mean_squared_norm - dim)  # (batch, 1)
            loss += self.dual_weight * _mean(squares) / (2 * dim)
        return loss

    def compile(self, optimizer=None, **kwargs):
        """Set the optimizer; None is ``Adam(1e-3)``. Other arguments as for ``keras.Model.compile``."""
        super().compile(optimizer=keras.optimizers.Adam(1e-3) if optimizer is None else optimizer, **kwargs)
        if self.built:
            is_frozen = not self.trainable
            if is_frozen:  # slots for all weights, whether it was frozen before or after: files of both can be loaded
                self.trainable = True
            self.optimizer.build(self.trainable_variables)  # only a built optimizer is saved with its slots
            if is_frozen:
                self.trainable = False

    def get_compile_config(self):
        if not self.compiled:
            return None
        return {"optimizer": keras.saving.serialize_keras_object(self.optimizer), **self._compile_options}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    @property
    def metrics(self):
        return [self.loss_tracker]

    def train_step(self, data):
        x = check_finite(self._as_points(self._unpack(data)), "the batch of data")
        key = _key(self.seed, _TRAIN, self.optimizer.iterations)
        loss = _descend(
            self,
            self.optimizer,
            self,
            "the loss",
            _Part(tf.shape(x)[0]),
            lambda: self.denoising_loss(x, key, training=True),
        )
        self.loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return {"loss": self.loss_tracker.result()}

    def test_step(self, data):
        x = self._as_points(self._unpack(data))
        # Keyed by the points seen since the metrics were reset: each evaluation meets the same noise.
        key = _key(self.seed, _EVALUATE, _sum_over_replicas(self.loss_tracker.count))
        loss = self.denoising_loss(x, key)
        self.loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return {"loss": self.loss_tracker.result()}

    def get_config(self):
        return {
            **super().get_config(),
            "net": keras.saving.serialize_keras_object(self.net),
            "noise_std": self.noise_std,
            "dual_weight": self.dual_weight,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "net": keras.saving.deserialize_keras_object(config["net"])})

    def _endpoints(self):
        point = tf.TensorSpec((None, *self.event_shape), self.variable_dtype)
        endpoints = {"serve": (self.call, [point])}
        if self.noise_conditional:
            level = tf.TensorSpec((None,), self.variable_dtype)
            endpoints["serve_level"] = (self.call, [point, level])
        return endpoints

    def _as_points(self, x):
        x = keras.ops.convert_to_tensor(x, dtype=self.variable_dtype)
        expected = _input_shape(self.net)
        if x.shape.rank == 0 or (expected and not x.shape[1:].is_compatible_with(expected[1:])):
            raise ValueError(
                f"points must have shape {_format_points(expected or ('batch', '...'))}, got {tuple(x.shape)}"
            )
        return x

    def _log_noise_std(self, x, noise_std):
        """Logarithm (batch, 1) of the level asked for."""
        low, high = self.noise_range
        level = low if noise_std is None else noise_std
        if not tf.is_tensor(level) or tf.executing_eagerly():  # the values in a graph are not known yet
            level = np.asarray(level)
            if level.dtype.kind not in "fiu":
                raise ValueError(f"noise_std must be a number or one a point, got {noise_std!r}")
            if level.ndim and level.shape not in ((x.shape[0],), (x.shape[0], 1)):
                raise ValueError(f"noise_std must be a number or one a point, ({x.shape[0]},); got shape {level.shape}")
            # The tolerance forgives levels that went through float32.
            if not ((level >= low * (1 - 1e-6)) & (level <= high * (1 + 1e-6))).all():
                raise ValueError(f"noise_std must be within [{low}, {high}], the range trained on; got {noise_std!r}")
        level = tf.reshape(tf.cast(level, x.dtype), (-1, 1))
        return tf.broadcast_to(tf.math.log(level), (tf.shape(x)[0], 1))

    def _evaluate(self, x, log_noise_std, training=False):
        log_density = self.net([x, log_noise_std] if self.noise_conditional else x, training=training)
        self.built = True  # training does not pass through __call__, which would set it
        _check_scalar_output(log_density.shape)
        return tf.cast(log_density, x.dtype)

    def _differentiate(self, x, log_noise_std, training=False):
        """Log density (batch, 1), its gradient (batch, *event), and its derivative (batch, 1) along log(noise_std)."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch((x, log_noise_std))
            log_density = self._evaluate(x, log_noise_std, training)
        return log_density, *tape.gradient(log_density, (x, log_noise_std))


# ---------------------------------------------------------------------------------------------- EGM


@keras.saving.register_keras_serializable(_PACKAGE)
class EGM(ResumableModel):
    """Energy-based generative model: a generator that descends the KL divergence between two DDEs.

    ``dde_real`` learns the noisy density p~ of the data, ``dde_fake`` the noisy density q~ of the generated points,
    and the generator g minimises KL(q~ || p~) (arXiv:2001.02728, Eq. 8), estimated by

        mean of dde_fake(y) - dde_real(y)  at  y = g(z) + noise_std * noise,  z ~ N(0, I),

    in nats, up to the two constants. The gradient reaches g through y alone: both DDEs are frozen in this step, and
    no normaliser is needed. (The algorithm printed in the paper has a plus sign where its own code descends.)
    With a range of noise levels, this is averaged over the levels as the DDEs draw them.

    One training step is one step of the generator, then ``dde_steps`` steps of each DDE, on the batch of data and on
    as many freshly generated points, with fresh noise in each. All randomness is a function of ``seed`` and the
    number of steps made. A ``dde_real`` that was trained before need not go on: with ``dde_real.trainable = False``,
    set before ``compile``, it stays as it is, its loss is still measured, and a step takes about half as long.

    The generator's gradient is the noisiest estimate of the three, so its step uses ``latents_per_point`` times as
    many latents, and in all training steps latents are spread evenly over their space. Samples come from
    ``average_generator``, whose weights are a moving average. Calling the model maps latents (batch, *latent) to
    points (batch, *event) by that average. The losses, in training and in ``evaluate``, are those of ``generator``
    itself, which ``dde_fake`` follows.

    Args:
        dde_real: ``DDE`` of the data.
        dde_fake: ``DDE`` of the generated points, with the same ``noise_std``.
        generator: ``keras.Model`` from latents (batch, *latent) to points (batch, *event).
        dde_steps: steps of each DDE for one step of the generator, an integer of at least 1.
        latents_per_point: number of latents in a step of the generator for each point of the batch of data.
        average_decay: decay in [0, 1) of the moving average of the generator's weights; it is smaller in the first
            steps, so that the average forgets the initial weights.
        seed: integer that fixes all latents and noise; None draws one from Python's ``random``.

    Raises:
        ValueError: for DDEs that are the same object, share their network or differ in ``noise_std``, a generator
            whose output does not fit them, networks whose shapes are not known yet, or other arguments out of range.
    """

    def __init__(
        self, dde_real, dde_fake, generator, dde_steps=5, latents_per_point=2, average_decay=0.998, seed=None, **kwargs
    ):
        super().__init__(autocast=False, **kwargs)
        for name, dde in (("dde_real", dde_real), ("dde_fake", dde_fake)):
            if not isinstance(dde, DDE):
                raise ValueError(f"{name} must be a DDE, got {dde!r}")
        _check_network("generator", generator, num_inputs=1)
        if dde_real is dde_fake or dde_real.net is dde_fake.net:
            raise ValueError("dde_real and dde_fake must be two DDEs with a network each, got one used twice")
        if dde_real.noise_std != dde_fake.noise_std:
            raise ValueError(
                "dde_real and dde_fake must have the same noise_std, "
                f"got {dde_real.noise_std!r} and {dde_fake.noise_std!r}"
            )
        check_positive_integer("dde_steps", dde_steps)
        check_positive_integer("latents_per_point", latents_per_point)
        if not _is_finite_number(average_decay) or not 0 <= average_decay < 1:
            raise ValueError(f"average_decay must be at least 0 and less than 1, got {average_decay!r}")
        for name, net in (("dde_real", dde_real.net), ("dde_fake", dde_fake.net), ("generator", generator)):
            if _input_shape(net) is None:
                raise ValueError(
                    f"the shapes of {name} must be known: give its network a keras.Input, or call it on a batch; "
                    f"got {net!r}"
                )
        for name, dde in (("dde_real", dde_real), ("dde_fake", dde_fake)):
            expected, given = _input_shape(dde.net), _output_shape(generator)
            if expected[1:] != tuple(given[1:]):
                raise ValueError(
                    f"the generator must return points of shape {_format_points(expected)} to fit {name}, "
                    f"got {_format_points(given)}"
                )
        self.dde_real = dde_real
        self.dde_fake = dde_fake
        self.generator = generator
        self.average_generator = _copy_network(generator)
        self.average_generator.trainable = False
        self.dde_steps = int(dde_steps)
        self.latents_per_point = int(latents_per_point)
        self.average_decay = float(average_decay)
        self.seed = _check_seed(seed)
        self.latent_shape = _input_shape(generator)[1:]
        self.loss_dde_real_tracker = keras.metrics.Mean("loss_dde_real")
        self.loss_dde_fake_tracker = keras.metrics.Mean("loss_dde_fake")
        self.gen_loss_tracker = keras.metrics.Mean("gen_loss")
        self.built = True

    def call(self, z):
        return tf.cast(self.average_generator(z), self.variable_dtype)

    @property
    def num_steps(self):
        """Number of training steps made."""
        # The last network to be updated counts: a step is made when all of it is.
        return _count_steps(self.dde_fake_optimizer) // self.dde_steps if self.compiled else 0

    @property
    def event_shape(self):
        """Shape of a point."""
        return self.dde_real.event_shape

    @property
    def smallest_noise_std(self):
        """The lowest level of the DDEs, in data units."""
        return self.dde_real.smallest_noise_std

    def sample(self, n_samples, seed=None):
        """Generate points: one pass of the generator, no iterations.

        Args:
            n_samples: number of points, an integer of at least 1.
            seed: integer for repeatable latents; None draws fresh ones.

        Returns:
            NumPy array (n_samples, *event), in data units, without added noise.

        Raises:
            ValueError: for an ``n_samples`` that is not an integer of at least 1.
        """
        check_positive_integer("n_samples", n_samples)
        seed = _check_seed(seed)
        chunks = []
        for start in range(0, n_samples, _SAMPLES_PER_CHUNK):
            size = min(_SAMPLES_PER_CHUNK, n_samples - start)
            z = _draw_normal((size, *self.latent_shape), _key(seed, _SAMPLE, start), _LATENTS, self.variable_dtype)
            chunks.append(self(z).numpy())
        return np.concatenate(chunks)

    def compile(self, dde_optimizer=None, gen_optimizer=None, **kwargs):
        """Set the optimizers.

        Args:
            dde_optimizer: ``keras.optimizers.Optimizer`` (or its name) of the DDEs; each DDE gets a copy of its own.
                Its learning rate schedule counts DDE steps. None is ``Adam(5e-3, beta_1=0.5)``.
            gen_optimizer: the generator's. None is ``Adam(2e-3, beta_1=0.5)``.
            **kwargs: as for ``keras.Model.compile``, such as ``jit_compile`` and ``steps_per_execution``.
        """
        super().compile(optimizer=None, **kwargs)
        dde_optimizer = keras.optimizers.get(dde_optimizer or keras.optimizers.Adam(5e-3, beta_1=0.5))
        gen_optimizer = keras.optimizers.get(gen_optimizer or keras.optimizers.Adam(2e-3, beta_1=0.5))
        # An optimizer belongs to the variables it was built on.
        self.dde_real_optimizer = _copy_optimizer(dde_optimizer, self.dde_real.trainable_variables)
        self.dde_fake_optimizer = _copy_optimizer(dde_optimizer, self.dde_fake.trainable_variables)
        self.gen_optimizer = _copy_optimizer(gen_optimizer, self.generator.trainable_variables)

    @property
    def metrics(self):
        return [self.loss_dde_real_tracker, self.loss_dde_fake_tracker, self.gen_loss_tracker]

    def generator_loss(self, z, key, training=False):
        """Estimate KL(q~ || p~) up to a constant, in nats (arXiv:2001.02728, Eq. 8).

        Args:
            z: latents (batch, *latent).
            key: uint64 tensor (2,), the seed and the stream of the noise.
            training: whether layers of the generator such as dropout behave as in training.

        Returns:
            Scalar tensor, differentiable in the generator's weights.
        """
        noisy_y, _, log_noise_std = self.dde_fake.add_noise(self._generate(z, training), key, _Part(tf.shape(z)[0]))
        log_ratio = self.dde_fake._evaluate(noisy_y, log_noise_std) - self.dde_real._evaluate(noisy_y, log_noise_std)
        return _mean(log_ratio)

    def train_step(self, data):
        x = check_finite(self.dde_real._as_points(self._unpack(data)), "the batch of data")
        batch_size = tf.shape(x)[0]

        key = _key(self.seed, _GENERATOR, self.gen_optimizer.iterations)
        z = self._draw_latents(self.latents_per_point * batch_size, key)
        part = _Part(batch_size)
        gen_loss = _descend(
            self,
            self.gen_optimizer,
            self.generator,
            "gen_loss",
            part,
            lambda: self.generator_loss(z, key, training=True),
        )
        self._average_weights()
        is_frozen = not self.dde_real.trainable_variables
        if is_frozen:
            key = _key(self.seed, _REAL, self.gen_optimizer.iterations)
            self.loss_dde_real_tracker.update_state(self.dde_real.denoising_loss(x, key), sample_weight=batch_size)
        for _ in range(self.dde_steps):
            if not is_frozen:
                key = _key(self.seed, _REAL, self.dde_real_optimizer.iterations)
                loss_dde_real = _descend(
                    self,
                    self.dde_real_optimizer,
                    self.dde_real,
                    "loss_dde_real",
                    part,
                    lambda key=key: self.dde_real.denoising_loss(x, key, training=True),
                )
                self.loss_dde_real_tracker.update_state(loss_dde_real, sample_weight=batch_size)
            key = _key(self.seed, _FAKE, self.dde_fake_optimizer.iterations)
            y = self._generate(self._draw_latents(batch_size, key), training=True)
            loss_dde_fake = _descend(
                self,
                self.dde_fake_optimizer,
                self.dde_fake,
                "loss_dde_fake",
                part,
                lambda y=y, key=key: self.dde_fake.denoising_loss(y, key, training=True),
            )
            self.loss_dde_fake_tracker.update_state(loss_dde_fake, sample_weight=batch_size)
        self.gen_loss_tracker.update_state(gen_loss, sample_weight=batch_size)
        return self.get_metrics_result()

    def test_step(self, data):
        x = self.dde_real._as_points(self._unpack(data))
        batch_size = tf.shape(x)[0]
        key = _key(self.seed, _EVALUATE, _sum_over_replicas(self.gen_loss_tracker.count))
        z = self._draw_latents(batch_size, key)
        self.gen_loss_tracker.update_state(self.generator_loss(z, key), sample_weight=batch_size)
        for tracker, dde, points in (
            (self.loss_dde_real_tracker, self.dde_real, x),
            (self.loss_dde_fake_tracker, self.dde_fake, self._generate(z)),
        ):
            tracker.update_state(dde.denoising_loss(points, key), sample_weight=batch_size)
        return self.get_metrics_result()

    def get_config(self):
        parts = {name: getattr(self, name) for name in ("dde_real", "dde_fake", "generator")}
        return {
            **super().get_config(),
            **{name: keras.saving.serialize_keras_object(part) for name, part in parts.items()},
            "dde_steps": self.dde_steps,
            "latents_per_point": self.latents_per_point,
            "average_decay": self.average_decay,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        parts = ("dde_real", "dde_fake", "generator")
        return cls(**{**config, **{name: keras.saving.deserialize_keras_object(config[name]) for name in parts}})

    def get_compile_config(self):
        if not self.compiled:
            return None
        return {
            "dde_optimizer": keras.saving.serialize_keras_object(self.dde_real_optimizer),
            "gen_optimizer": keras.saving.serialize_keras_object(self.gen_optimizer),
            **self._compile_options,
        }

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    def _endpoints(self):
        point = tf.TensorSpec((None, *self.event_shape), self.variable_dtype)
        latent = tf.TensorSpec((None, *self.latent_shape), self.variable_dtype)
        number = tf.TensorSpec([], tf.int32)

        def sample(n_samples, seed):
            shape = tf.concat([[n_samples], self.latent_shape], axis=0)
            return self.call(_draw_normal(shape, _key(seed, _SAMPLE, 0), _LATENTS, self.variable_dtype))

        return {
            "serve": (self.call, [latent]),
            "sample": (sample, [number, number]),
            "log_density_and_score": (self.dde_real.call, [point]),
        }

    def _generate(self, z, training=False):
        """Map latents (batch, *latent) to points (batch, *event) by the generator that is trained."""
        return tf.cast(self.generator(z, training=training), self.variable_dtype)

    def _average_weights(self):
        num_steps = tf.cast(self.gen_optimizer.iterations, tf.float32)
        decay = tf.minimum(self.average_decay, num_steps / (num_steps + 10.0))
        for average, variable in zip(self.average_generator.weights, self.generator.weights, strict=True):
            average.assign(variable + tf.cast(decay, variable.dtype) * (average - variable))

    def _draw_latents(self, batch_size, key):
        """Draw standard normal latents that fill their space more evenly than independent ones.

        Each latent is standard normal by itself, but a batch of them has nearly the same share in every part of the
        plane of two coordinates, so that the modes of a generator get nearly their right shares of each batch. The
        points (i sqrt(2), i sqrt(3)) mod 1 (Richtmyer 1951) are shifted by a random vector modulo 1 (Cranley and
        Patterson 1976) and become two normal coordinates by radius and angle (Box and Muller 1958). Each pair of
        coordinates has a shift and a random order of its own. On several devices, each takes its part.
        """
        dim = math.prod(self.latent_shape)
        num_pairs = (dim + 1) // 2
        part = _Part(batch_size)
        order = tf.argsort(_draw_uniform([num_pairs, part.whole_size], key, _ORDER, tf.float32))
        shifts = _draw_uniform([2, num_pairs, 1], key, _LATENTS, tf.float64)
        places = [tf.cast(order, tf.float64) * math.sqrt(prime) + shifts[i] for i, prime in enumerate((2, 3))]
        fractions = [tf.cast(place - tf.floor(place), tf.float32) for place in places]  # each (num_pairs, batch)
        radius = tf.sqrt(-2.0 * tf.math.log(tf.maximum(fractions[0], 1e-9)))  # 0 would be infinitely far
        angle = 2.0 * math.pi * fractions[1]
        pairs = tf.stack([radius * tf.cos(angle), radius * tf.sin(angle)], axis=-1)  # (num_pairs, batch, 2)
        z = tf.reshape(tf.transpose(pairs, (1, 0, 2)), (part.whole_size, 2 * num_pairs))[:, :dim]
        return tf.reshape(tf.cast(part.take(z), self.variable_dtype), (batch_size, *self.latent_shape))


# ---------------------------------------------------------------------------------------------- helpers

# Bounds the memory of EGM.sample: this many points at a time.
_SAMPLES_PER_CHUNK = 2**16

# Each noisy point is compared with this many points of its batch at most.
_SOURCES_PER_BLOCK = 512


class _Part:
    """The part of a batch that this replica of the model has: all of it, unless ``tf.distribute`` shares it out.

    Whatever is drawn is drawn for the whole batch, and the part taken from it, so that the number of devices does not
    matter: the sum of their gradients is that of one device.
    """

    def __init__(self, size):
        self.size = size
        self.is_whole = tf.distribute.get_strategy().num_replicas_in_sync == 1
        if self.is_whole:
            self.whole_size = size
        else:
            context = tf.distribute.get_replica_context()
            sizes = context.all_gather(tf.reshape(size, [1]), axis=0)  # (replicas,)
            self._start = tf.reduce_sum(sizes[: context.replica_id_in_sync_group])
            self.whole_size = tf.reduce_sum(sizes)

    def take(self, values):
        """This replica's part of values (batch, ...)."""
        return values if self.is_whole else values[self._start : self._start + self.size]

    def gather(self, x):
        """The points of all replicas, from those of this one."""
        if self.is_whole:
            return x
        whole = tf.distribute.get_replica_context().all_gather(tf.stop_gradient(x), axis=0)
        return tf.ensure_shape(whole, (None, *x.shape[1:]))

    def weigh(self, loss):
        """The mean over this part's points as its share of the mean over the whole batch: replicas are summed."""
        return loss if self.is_whole else loss * tf.cast(self.size, loss.dtype) / tf.cast(self.whole_size, loss.dtype)


def _mean(values):
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return tf.reduce_mean(values)
    return tf.reduce_sum(values) / tf.cast(tf.maximum(tf.size(values), 1), values.dtype)  # 0 for an empty part


def _sum_over_replicas(value):
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return value
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def _descend(model, optimizer, network, name, part, loss):
    """Take one optimizer step down ``loss()`` in the network's weights; return its value before the step.

    Where the loss or its gradient is not finite, the step is not taken: an error is raised, or, compiled by XLA, which
    has no errors, the value returned is NaN.
    """
    with tf.GradientTape() as tape:
        value = loss()
        weighed = part.weigh(value)
    variables = network.trainable_variables  # read here: the loss is what builds a network without an Input
    gradients = tape.gradient(weighed, variables)
    known = [gradient for gradient in gradients if gradient is not None]  # of weights that the loss depends on
    if not model.jit_compile:
        checks = [check_finite(value, name), *(check_finite(gradient, f"the gradient of {name}") for gradient in known)]
        with tf.control_dependencies(checks):
            optimizer.apply(gradients, variables)  # and counts the step
        return value
    is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(values)) for values in (value, *known)])
    tf.cond(is_finite, lambda: optimizer.apply(gradients, variables), lambda: None)
    return tf.where(is_finite, value, math.nan)


def _damped_waves(phases, decay=None):
    """Sine and cosine of the phases, times exp(-decay): functions whose derivatives of any order are each other.

    TensorFlow does not know that: it computes sines, cosines and exponentials anew in every derivative, which takes a
    tenth of a training step.
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


def _expected_square(estimate, target, mean_target):
    """(estimate - target)^2, where the estimate meets the mean of the targets that it may have had."""
    return tf.square(estimate - mean_target) + tf.square(target) - tf.square(mean_target)


def _average_over_sources(x, noisy_x, noise, log_noise_std):
    """Average the noise over all points of the batch that a noisy point may have come from, not its own alone.

    Seen from y = noisy_x_i, point x_j is the source with probability w_ij, proportional to
    exp(-||y - x_j||^2 / (2 noise_std_i^2)), and the noise was (y - x_j) / noise_std_i. It is attention over the batch:
    two matrix products and a softmax.

    In expectation over the noise, the sum over a batch of these averages times any function of y is that of the noise
    itself: sum_i N(y; x_i) sum_j w_j n_j = sum_j N(y; x_j) n_j. So the gradient of the loss keeps its expectation.

    Args:
        x: clean points (batch, *event).
        noisy_x: noisy points (batch, *event).
        noise: their noise (batch, *event), in noise units.
        log_noise_std: their levels (batch, 1).

    Returns:
        mean_noise (batch, *event), the squared norm (batch, 1) of ``noise``, and its average (batch, 1).
    """
    batch_size, dim = tf.shape(x)[0], math.prod(x.shape[1:])
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32  # half precision is too coarse for exponents
    flat_x, y, flat_noise = (tf.cast(tf.reshape(points, (-1, dim)), dtype) for points in (x, noisy_x, noise))
    centre = tf.reduce_mean(flat_x, axis=0)  # the smaller the numbers, the smaller the rounding errors
    flat_x, y = flat_x - centre, y - centre
    precision = tf.exp(-2.0 * tf.cast(log_noise_std, dtype))
    squared_norm = tf.reduce_sum(tf.square(flat_noise), axis=-1, keepdims=True)
    squared_y = tf.reduce_sum(tf.square(y), axis=-1, keepdims=True)
    # Up to a term that x_j does not enter, the exponent is a product: (y x_j - ||x_j||^2 / 2) / noise_std^2.
    sources = tf.concat([flat_x, tf.reduce_sum(tf.square(flat_x), axis=-1, keepdims=True)], axis=-1)
    queries = precision * tf.concat([y, tf.fill([batch_size, 1], tf.constant(-0.5, dtype))], axis=-1)
    # Blocks of points bound the memory; the last one is filled up with sources that are infinitely far away.
    block_size = tf.minimum(batch_size, _SOURCES_PER_BLOCK)
    num_filled = -batch_size % block_size
    infinitely_far = tf.one_hot(tf.fill([num_filled], dim), dim + 1, on_value=math.sqrt(dtype.max), dtype=dtype)
    sources = tf.reshape(tf.concat([sources, infinitely_far], axis=0), (-1, block_size, dim + 1))
    queries = tf.reshape(tf.pad(queries, [[0, num_filled], [0, 0]]), (-1, block_size, dim + 1))
    weights = tf.nn.softmax(tf.matmul(queries, sources, transpose_b=True))  # (blocks, block_size, block_size)
    means = tf.reshape(tf.matmul(weights, sources), (-1, dim + 1))[:batch_size]
    mean_x, mean_squared_x = means[:, :dim], means[:, dim:]
    mean_noise = tf.sqrt(precision) * (y - mean_x)
    mean_squared_norm = precision * (
        squared_y - 2.0 * tf.reduce_sum(y * mean_x, axis=-1, keepdims=True) + mean_squared_x
    )
    # Where rounding would move an exponent noticeably, the own noise stays.
    is_exact = np.finfo(dtype.as_numpy_dtype).eps * precision * squared_y < 0.1
    mean_noise = tf.reshape(tf.where(is_exact, mean_noise, flat_noise), tf.shape(x))
    mean_squared_norm = tf.where(is_exact, mean_squared_norm, squared_norm)
    return tuple(tf.cast(result, x.dtype) for result in (mean_noise, squared_norm, mean_squared_norm))


def _count_steps(optimizer):
    return int(keras.ops.convert_to_numpy(optimizer.iterations))  # one of several copies, on several devices


def _copy_optimizer(optimizer, variables):
    optimizer = type(optimizer).from_config(optimizer.get_config())
    optimizer.build(variables)
    return optimizer


def _copy_network(net):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(net))
    if not copy.built:
        copy.build(_input_shape(net))
    copy.set_weights(net.get_weights())
    return copy


def _key(seed, purpose, step):
    """Key of a draw, uint64 (2,): the seed, and the number of a stream of its own for purpose and step."""
    stream = 2**56 * purpose + tf.cast(step, tf.int64)
    return tf.cast(tf.stack([tf.cast(seed, tf.int64), stream]), tf.uint64)


# The raw operations take seed and counter as they are. tf.random.stateless_normal hashes them first, with dozens of
# small operations that take a tenth of a training step, and could let two streams collide.


def _draw_normal(shape, key, place, dtype):
    return tf.raw_ops.StatelessRandomNormalV2(**_counter(key, place), shape=shape, dtype=dtype)


def _draw_uniform(shape, key, place, dtype):
    return tf.raw_ops.StatelessRandomUniformV2(**_counter(key, place), shape=shape, dtype=dtype)


def _counter(key, place):
    seed, stream = tf.unstack(key)
    counter = tf.stack([tf.constant(place, tf.uint64), stream])
    return {"key": seed[None], "counter": counter, "alg": tf.random.Algorithm.PHILOX.value}


def _per_event(values, x):
    """Reshape values (batch, 1) so that they broadcast against x (batch, *event)."""
    return tf.reshape(values, (-1,) + (1,) * (x.shape.rank - 1))


def _input_shape(net):
    """Shape (None, ...) of a network's points, its first input; None if it is not known yet."""
    if getattr(net, "inputs", None):
        return tuple(net.inputs[0].shape)
    shape = (net.get_build_config() or {}).get("input_shape") if net.built else None  # kept by the first call
    if shape is None:
        return None
    shape = shape[0] if isinstance(shape[0], (list, tuple)) else shape  # of [x, log(noise_std)]
    return (None, *shape[1:])


def _output_shape(net):
    return tuple(net.compute_output_spec(keras.KerasTensor(_input_shape(net))).shape)


def _format_points(shape):
    return format_shape(("batch", *shape[1:]))


def _check_network(name, net, num_inputs):
    """Check what a network is, and its numbers of inputs and outputs as far as they are known before it is called."""
    if not isinstance(net, keras.Model):
        raise ValueError(f"{name} must be a keras.Model, got {net!r}")
    for kind, needed in (("inputs", num_inputs), ("outputs", 1)):
        given = getattr(net, kind, None)
        if given and len(given) != needed:
            hint = " (x, or [x, log(noise_std)] for a range of levels)" if (name, kind) == ("net", "inputs") else ""
            raise ValueError(f"{name} must have {needed} {kind[:-1]}(s){hint}; got {len(given)}")


def _check_layers(net):
    """Refuse what is no density's, and warn of what has no useful score, as far as its layers are known."""
    for layer in net._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            raise ValueError(
                f"net must not use batch normalization ({layer.name}): it makes the log density of a point depend on "
                "the other points of its batch; LayerNormalization and GroupNormalization do not"
            )
        if layer.compute_dtype == "float16":
            raise ValueError(
                f"net must not compute in float16 ({layer.name}): the second derivatives that train it leave its "
                "range; use float32, float64 or mixed_bfloat16"
            )
        kinked = isinstance(layer, (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.PReLU))
        activation = getattr(layer, "activation", None)
        if kinked or (callable(activation) and _is_piecewise_linear(activation)):
            name = layer.name if kinked else f"{getattr(activation, '__name__', activation)} of {layer.name}"
            warnings.warn(
                f"{name} is piecewise linear: the score of such a network is piecewise constant and learns badly; "
                "use a smooth activation such as tanh, silu, gelu or softplus",
                stacklevel=4,
            )


def _is_piecewise_linear(activation):
    """Whether a function of a number has straight parts alone, and more than one of them."""
    x = tf.linspace(-7.9, 8.1, 161)[:, None]
    try:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = activation(x)
            slope = inner.gradient(y, x)
        curvature = outer.gradient(slope, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    except Exception:  # not a function of numbers one by one: nothing is known of it
        return False
    if slope is None:
        return False
    return bool(tf.reduce_all(curvature == 0.0) and tf.reduce_max(slope) > tf.reduce_min(slope))


def _is_finite_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_noise_std(noise_std):
    """Return noise_std as a float or a pair of floats, and as a pair (low, high)."""
    is_pair = np.ndim(noise_std) == 1 and len(noise_std) == 2
    low, high = noise_std if is_pair else (noise_std, noise_std)
    if not all(_is_finite_number(level) and level > 0 for level in (low, high)) or (is_pair and low >= high):
        raise ValueError(
            "noise_std must be a positive finite number, or a pair (low, high) of such with low < high; "
            f"got {noise_std!r}"
        )
    low, high = float(low), float(high)
    return ((low, high) if is_pair else low), (low, high)


def _check_seed(seed):
    if seed is None:
        return random.getrandbits(31)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be None or an integer from 0 to 2**31 - 1, got {seed!r}")
    return int(seed)


def _check_scalar_output(shape):
    if not isinstance(shape, (tuple, tf.TensorShape)) or len(shape) != 2 or shape[1] != 1:
        raise ValueError(f"a DDE's network must return one number a point, shape (batch, 1); got shape {shape}")
