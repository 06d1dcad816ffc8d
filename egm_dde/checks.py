"""Checks of arguments, networks and data: each is written once, here, and says what is allowed and what was given.

TensorFlow and Keras are imported where they are needed: utils.py and evaluation.py do without.
"""

import math
import numbers
import random
import warnings

import numpy as np

# Data so many standard deviations off, or so many times as wide or narrow as a network was built for, train badly.
FAR, WIDE, NARROW = 2.0, 2.0, 10.0
PIECEWISE_LINEAR = set(
    "relu relu6 leaky_relu leakyrelu prelu hard_tanh hard_sigmoid hard_shrink hard_silu soft_shrink threshold".split()
)


def is_finite_number(value):
    """Whether a value is a real number, neither infinite nor a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name, value, smallest=1, end=math.inf):
    """Return an integer of at least ``smallest`` and less than ``end`` as an int, or raise ValueError."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not smallest <= value < end:
        upper = f" and less than {end}" if end < math.inf else ""
        raise ValueError(f"{name} must be an integer of at least {smallest}{upper}, got {value!r}")
    return int(value)


def check_positive(name, value):
    """Return a positive finite number as a float, or raise ValueError."""
    if not is_finite_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def check_interval(name, value, low, high=math.inf):
    """Return a number in [low, high) as a float, or raise ValueError."""
    if not is_finite_number(value) or not low <= value < high:
        upper = f" and less than {high}" if high < math.inf else ""
        raise ValueError(f"{name} must be a finite number of at least {low}{upper}, got {value!r}")
    return float(value)


def check_seed(seed):
    """Return a seed as an int; None draws one from Python's ``random``."""
    return random.getrandbits(31) if seed is None else check_integer("seed, unless it is None,", seed, 0, 2**31)


def check_noise_std(noise_std):
    """Return a noise level as a float or a pair of floats, and as a pair (low, high)."""
    is_pair = np.ndim(noise_std) == 1 and len(noise_std) == 2
    low, high = noise_std if is_pair else (noise_std, noise_std)
    if not all(is_finite_number(level) and level > 0 for level in (low, high)) or (is_pair and low >= high):
        needed = "a positive finite number, or a pair (low, high) of such with low < high"
        raise ValueError(f"noise_std must be {needed}; got {noise_std!r}")
    low, high = float(low), float(high)
    return ((low, high) if is_pair else low), (low, high)


def check_levels(noise_std, noise_range, num_points):
    """Check noise levels, as far as their values are known: a number, or one a point, within the range trained on."""
    import tensorflow as tf

    if tf.is_tensor(noise_std) and not tf.executing_eagerly():  # the values in a graph are not known yet
        return
    low, high = noise_range
    level = np.asarray(noise_std)
    if level.dtype.kind not in "fiu" or (level.ndim and level.shape not in ((num_points,), (num_points, 1))):
        given = f"{noise_std!r} of shape {level.shape}"
        raise ValueError(f"noise_std must be a number or one a point, ({num_points},); got {given}")
    if not ((level >= low * (1 - 1e-6)) & (level <= high * (1 + 1e-6))).all():  # forgives levels made of float32
        raise ValueError(f"noise_std must be within [{low}, {high}], the range trained on; got {noise_std!r}")


def check_sizes_and_scales(sizes, widths, scales):
    """Check the arguments of a builder: integers by name, sizes of layers, and positive numbers by name."""
    if not isinstance(widths, (tuple, list)):
        raise ValueError(f"widths must be a sequence of integers, got {widths!r}")
    for name, size in [*sizes.items(), *(("each of widths", width) for width in widths)]:
        check_integer(name, size)
    for name, scale in scales.items():
        check_positive(name, scale)


def check_images(images):
    """Return finite images (n, height, width, channels), not all alike, as an array."""
    images = np.asarray(images)
    is_finite = images.ndim == 4 and images.dtype.kind in "fiu" and np.isfinite(images).all()
    if not is_finite or (images == images[:1]).all():
        needed = "finite numbers of shape (n, height, width, channels), not all alike"
        raise ValueError(f"images must be {needed}, got {images.dtype} of shape {images.shape}")
    return images


def check_instance(name, value, cls):
    """Return a value, or raise ValueError if it is no instance of a class, or of that class before it was reloaded."""
    if isinstance(value, cls):
        return value
    if any((kind.__module__, kind.__qualname__) == (cls.__module__, cls.__qualname__) for kind in type(value).__mro__):
        remedy = f"{name} holds a {cls.__name__} of before: restart the kernel"
        raise ValueError(f"{cls.__module__} was reloaded, and {remedy}")
    raise ValueError(f"{name} must be a {cls.__name__}, got a {type(value).__name__}: {value!r}")


def check_callbacks(callbacks, losses):
    """Refuse callbacks made for one loss and one learning rate, where a model has several, with names ``losses``."""
    import keras

    if "loss" in losses:
        return
    for callback in callbacks:
        kind, watched = type(callback).__name__, getattr(callback, "monitor", None)
        if isinstance(callback, (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)):
            why = "sets one learning rate, and each network of this model has its own"
            raise ValueError(f"{kind} {why}: give compile optimizers with learning rate schedules")
        if watched in ("loss", "val_loss") and getattr(callback, "save_best_only", True):
            allowed = f'{", ".join(losses)} (or val_{losses[0]} ...), such as monitor="{losses[0]}", mode="min"'
            raise ValueError(f"{kind} watches {watched}, which is not logged; allowed are {allowed}")


def check_network(name, net, num_inputs):
    """Check what a network is, and its numbers of inputs and outputs as far as they are known before it is called."""
    import keras

    if not isinstance(net, keras.Model):
        raise ValueError(f"{name} must be a keras.Model, got {net!r}")
    for kind, needed in (("inputs", num_inputs), ("outputs", 1)):
        given = getattr(net, kind, None)
        if given and len(given) != needed:
            hint = " (x, or [x, log(noise_std)] for a range of levels)" if (name, kind) == ("net", "inputs") else ""
            raise ValueError(f"{name} must have {needed} {kind[:-1]}(s){hint}; got {len(given)}")


def check_energy_net(net, num_inputs):
    """Refuse layers that break a density (batch norm, float16); warn about piecewise linear ones such as ReLU."""
    import keras

    check_network("net", net, num_inputs)
    for layer in walk_layers(net):
        if isinstance(layer, keras.layers.BatchNormalization):
            why = "it makes the log density of a point depend on the other points of its batch"
            use = "LayerNormalization and GroupNormalization do not"
            raise ValueError(f"net must not use batch normalization ({layer.name}): {why}; {use}")
        if layer.compute_dtype == "float16":
            why = "the second derivatives that train it leave its range"
            use = "use float32, float64 or mixed_bfloat16"
            raise ValueError(f"net must not compute in float16 ({layer.name}): {why}; {use}")
        for activation in (layer, getattr(layer, "activation", None)):
            kind = getattr(activation, "__name__", type(activation).__name__).lower()
            if kind in PIECEWISE_LINEAR:
                why = "the score of such a network is piecewise constant and learns badly"
                use = "use a smooth activation such as tanh, silu, gelu or softplus"
                warnings.warn(f"{kind} of {layer.name} is piecewise linear: {why}; {use}", stacklevel=3)
    if net.built and getattr(net, "output_shape", None) is not None:
        check_scalar_output(net.output_shape)


def check_scalar_output(shape):
    """Check the shape of what the network of a DDE returns."""
    import tensorflow as tf

    if not isinstance(shape, (tuple, tf.TensorShape)) or len(shape) != 2 or shape[1] != 1:
        raise ValueError(f"a DDE's network must return one number a point, shape (batch, 1); got shape {shape}")


def check_egm_parts(dde_real, dde_fake, generator):
    """Check that two DDEs and a generator fit together, and that their shapes are known."""
    import keras

    check_network("generator", generator, num_inputs=1)
    if dde_real is dde_fake or dde_real.net is dde_fake.net:
        raise ValueError("dde_real and dde_fake must be two DDEs with a network each, got one used twice")
    if dde_real.noise_std != dde_fake.noise_std:
        given = f"{dde_real.noise_std!r} and {dde_fake.noise_std!r}"
        raise ValueError(f"dde_real and dde_fake must have the same noise_std, got {given}")
    for name, net in (("dde_real", dde_real.net), ("dde_fake", dde_fake.net), ("generator", generator)):
        if input_shape(net) is None:
            remedy = "give its network a keras.Input, or call it on a batch"
            raise ValueError(f"the shapes of {name} must be known: {remedy}; got {net!r}")
    output = keras.tree.flatten(generator.compute_output_spec(keras.KerasTensor(input_shape(generator))))  # [point]
    given = tuple(output[0].shape)[1:]
    for name, dde in (("dde_real", dde_real), ("dde_fake", dde_fake)):
        if dde.event_shape != given:
            needed, got = (format_shape(("batch", *shape)) for shape in (dde.event_shape, given))
            raise ValueError(f"the generator must return points of shape {needed} to fit {name}, got {got}")


def walk_layers(layer):
    """All layers within a layer, however deep."""
    for inner in getattr(layer, "layers", None) or ():
        yield inner
        yield from walk_layers(inner)


def input_shape(net):
    """Shape (None, ...) of a network's points, its first input; None if it is not known yet."""
    if getattr(net, "inputs", None):
        return tuple(net.inputs[0].shape)
    shape = (net.get_build_config() or {}).get("input_shape") if net.built else None  # kept by the first call
    if shape is None:
        return None
    shape = shape[0] if isinstance(shape[0], (list, tuple)) else shape  # of [x, log(noise_std)]
    return (None, *shape[1:])


def as_array(x):
    """Return data as a NumPy array, with NaN where a container marks a value as missing."""
    if np.ma.isMaskedArray(x):
        return np.ma.filled(x.astype(np.result_type(x, np.float16)) if x.dtype.kind in "iu" else x, np.nan)
    array = np.asarray(x)
    if array.dtype.name == "bfloat16":  # not a type of NumPy itself
        return array.astype(np.float32)
    kinds = {getattr(dtype, "kind", "O") for dtype in np.ravel(getattr(x, "dtypes", getattr(x, "dtype", None)))}
    if array.dtype == object and kinds <= set("fiu"):  # nullable columns of numbers
        return x.to_numpy(dtype=np.float64, na_value=np.nan)
    return array


def check_points(name, x, event_shape, dtype, smallest_noise_std=math.inf):
    """Return data ``x`` as a NumPy array (n, *event), or raise ValueError, which calls them ``name``.

    None in ``event_shape`` stands for any size, None instead of it for any shape. ``dtype`` is float32 or float64;
    rounding errors are compared with ``smallest_noise_std``, in data units.
    """
    try:
        array = as_array(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of points: {error}") from None
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers (floats or integers), got {array.dtype}")
    given = array.shape[1:]
    expected = ("...",) if event_shape is None else event_shape
    pairs = zip(given, expected, strict=False)
    fits = len(given) == len(expected) and all(size in (None, found) for found, size in pairs)
    if not given or not (fits or event_shape is None):
        raise ValueError(f"{name} must have shape {format_shape(('n', *expected))}, got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must hold at least one point, got shape {array.shape}")
    with np.errstate(over="ignore"):  # it is reported below
        points = array.astype(dtype, copy=False)
    is_finite = np.isfinite(points).reshape(len(points), -1).all(axis=1)
    if not is_finite.all():
        first, share = int(np.argmin(is_finite)), f"{(~is_finite).sum()} of {len(points)} points"
        given = f"NaN, infinity or numbers too large for {dtype} in {share}"
        raise ValueError(f"{name} must be finite, got {given}, first at index {first}: {array[first].ravel()[:4]}")
    largest = np.abs(points).max()
    rounding = max(np.spacing(values.max()) for values in (largest, np.abs(array).max()) if values.dtype.kind == "f")
    if rounding > 0.1 * smallest_noise_std:
        given = f"{name} are as large as {largest:g}, where numbers of this type lie {rounding:g} apart"
        remedy = "subtract the mean, or divide by the standard deviation"
        raise ValueError(f"{given}, too far for a noise_std of {smallest_noise_std:g}: {remedy}")
    return points


def known_data(net):
    """Yield mean and standard deviation, numbers or one a coordinate, of the data that layers were built for."""
    for layer in walk_layers(net):
        if getattr(layer, "data_std", None) is not None:
            yield layer.data_mean, layer.data_std


def warn_of_units(points, networks):
    """Warn of data (n, d) far from those that one of the networks, a dict by name, was built for."""
    if points.ndim != 2:
        return
    mean, std = points.mean(axis=0, dtype=np.float64), points.std(axis=0, dtype=np.float64)
    for name, net in networks.items():
        for known in known_data(net):
            known_mean, known_std = (np.broadcast_to(each, mean.shape) for each in known)
            is_far = (abs(mean - known_mean) > FAR * np.maximum(std, known_std)) | (std > WIDE * known_std)
            is_far |= (NARROW * std < known_std) & (len(points) > 1)
            if is_far.any():
                i = int(np.argmax(is_far))
                built_for = f"mean {known_mean[i]:.4g} and standard deviation {known_std[i]:.4g}"
                found = f"column {i} of x has mean {mean[i]:.6g} and standard deviation {std[i]:.4g}"
                message = f"{name} was built for data with {built_for}, and {found}: build it with data=x"
                warnings.warn(message, stacklevel=4)
                break


def log_densities(log_density, points):
    """Return the log densities (n,) of points as float64: finite numbers or minus infinity, some of them finite."""
    values = np.asarray(log_density(points), dtype=np.float64)
    if values.shape not in ((len(points),), (len(points), 1)):
        raise ValueError(f"log_density must return shape (n,) or (n, 1), got {values.shape} for n = {len(points)}")
    if not np.isfinite(values.max()):  # the maximum is NaN if any value is
        raise ValueError(f"log_density must be finite or -inf, finite somewhere; its maximum is {values.max()}")
    return values.ravel()


def format_shape(shape):
    """Write a shape such as ("batch", 2) for people."""
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def format_duration(seconds):
    """Write a duration for people: "8.2 s" or "3 min 05 s"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"
