"""Small models with generic weights, and what several test modules measure them with."""

import contextlib
import inspect

import keras
import numpy as np

from energy_models import DDE, EGM, build_energy_net, build_generator

KEY, OTHER_KEY = np.array([3, 5]), np.array([3, 6])  # arrays, as tensors would start TensorFlow
NOISE = {"fixed": 0.4, "range": (0.2, 1.5)}
DDE_KINDS = ["fixed", "range", "images", "images and range"]


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@contextlib.contextmanager
def double_precision():
    """Build and run networks in float64, so that finite differences are exact to many digits; a decorator, too."""
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def image_net(noise_conditional):
    """Build a network of 4 x 4 images that uses nothing of the modules under test."""
    image, log_noise_std = keras.Input((4, 4, 1)), keras.Input((1,))
    hidden = keras.layers.Flatten()(keras.layers.Conv2D(3, 3, activation="tanh")(image))
    if noise_conditional:
        hidden = keras.layers.Concatenate()([hidden, log_noise_std])
    hidden = keras.layers.Dense(5, activation="silu")(hidden)
    inputs = [image, log_noise_std] if noise_conditional else image
    return keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(hidden))


def zero_net(dim, noise_conditional=False):
    """Build a network that has learned nothing: its score is zero everywhere."""
    x, log_noise_std = keras.Input((dim,)), keras.Input((1,))
    zero = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    if noise_conditional:
        return keras.Model([x, log_noise_std], zero(keras.layers.Concatenate()([x, log_noise_std])))
    return keras.Model(x, zero(x))


def identity_generator(*shape):
    return keras.Sequential([keras.Input(shape), keras.layers.Identity()])


def dense_net(num_outputs, *layers, seed=0, **options):
    """Build a network of points (batch, 3): the layers given, and two dense ones, the first with options."""
    initial = [keras.initializers.GlorotUniform(seed + i) for i in range(2)]
    hidden = keras.layers.Dense(5, "tanh", kernel_initializer=initial[0], **options)
    output = keras.layers.Dense(num_outputs, kernel_initializer=initial[1], use_bias=False)
    return keras.Sequential([keras.Input((3,)), *layers, hidden, output])


def make_dde(kind="fixed", net=None, seed=7, net_seed=0, **options):
    """Make a small DDE whose weights are all generic, with no zero biases, or that of a network given."""
    if net is None:
        sizes = {"num_features": 4, "feature_scale": 0.8, "data_std": 1.3}
        in_range = "range" in kind
        net = image_net(in_range) if "images" in kind else build_energy_net(3, in_range, (6, 5), "tanh", **sizes)
        net.set_weights([normal(*w.shape, seed=net_seed + i, scale=0.5) for i, w in enumerate(net.get_weights())])
    return DDE(net, NOISE["range" if "range" in kind else "fixed"], seed=seed, **options)


def make_egm(kind="fixed", **parts_and_options):
    """Make a small EGM of DDEs of a kind, and of any parts and options given."""
    parts = {
        "dde_real": make_dde(kind),
        "dde_fake": make_dde(kind, net_seed=50),
        "generator": build_generator(2, 3, (6, 5), "tanh", num_features=4, feature_scale=0.5, data_std=1.3, seed=2),
    }
    options = {"latents_per_point": 2, "average_decay": 0.15, "dde_steps": 2, "seed": 11}
    return EGM(**parts | options | parts_and_options)


def compiled(model, make_optimizer, **options):
    """Compile a model with an optimizer for each of its networks; return it."""
    model.compile(*(make_optimizer() for _ in model.networks), **options)
    return model


def egm_parts(dim=2, noise_stds=(0.1, 0.1)):
    """Two DDEs of planes that have learned nothing, and the identity as a generator."""
    ddes = (DDE(zero_net(2, isinstance(noise_std, tuple)), noise_std, seed=0) for noise_std in noise_stds)
    return (*ddes, identity_generator(dim))


def points_for(dde, n_points, seed=0):
    return normal(n_points, *dde.event_shape, seed=seed)


def ddes_of(model):
    return [model.dde_real, model.dde_fake] if isinstance(model, EGM) else [model]


def trained_parts(model):
    """The models with an optimizer each, in the order of the networks."""
    return [*ddes_of(model), *([model] if isinstance(model, EGM) else [])]


def values_of(variables):
    return [variable.numpy() for variable in variables]


def state(model):
    """All that a training step changes: weights of networks and of optimizers."""
    optimizers = [part.optimizer for part in trained_parts(model) if part.compiled]
    return values_of([*model.weights, *(variable for optimizer in optimizers for variable in optimizer.variables)])


def central_differences(function, x, step=1e-5):
    """Gradient (batch, *event) of ``function`` from (batch, *event) to (batch, 1), all coordinates at once."""
    shifts = step * np.eye(x[0].size).reshape(-1, 1, *x.shape[1:])  # (coordinates, 1, *event)
    ahead, behind = (np.asarray(function((x + each).reshape(-1, *x.shape[1:]))) for each in (shifts, -shifts))
    return ((ahead - behind) / (2 * step)).reshape(-1, len(x)).T.reshape(x.shape)


def record_calls(monkeypatch, owner, name):
    """Keep the arguments (as arrays) and the result of each call of a method; the model has to run eagerly."""
    original, calls = getattr(owner, name), []

    def recording(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        arguments = inspect.signature(original).bind(self, *args, **kwargs).arguments
        arrays = {key: np.array(value) for key, value in list(arguments.items())[1:]}  # without the model itself
        calls.append({"self": self, "result": float(result), **arrays})
        return result

    monkeypatch.setattr(owner, name, recording)
    return calls


def relative_error(estimate, exact):
    return np.sqrt(np.mean((np.asarray(estimate) - exact) ** 2) / np.mean(exact**2))


def assert_equal_arrays(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def differ(one, other):
    """Whether any of two lists of arrays differ."""
    return any(not np.array_equal(left, right) for left, right in zip(one, other, strict=True))


def assert_equal_states(one, *others):
    for other in others:
        assert_equal_arrays(state(one), state(other))
