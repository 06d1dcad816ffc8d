import itertools
import warnings
from functools import partial
from types import SimpleNamespace

import hypothesis
import hypothesis.extra.numpy as hnp
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st
from keras.optimizers import SGD, Adam
from small_models import assert_equal_arrays, differ, normal
from test_training import Batches

from egm_dde.checks import check_points
from energy_models import DDE, EGM, build_energy_net, build_generator


def make_dde(learning_rate=0.01, **options):
    # Unlike tanh, softplus has no bounds: too high a learning rate makes it overflow.
    dde = DDE(build_energy_net(2, False, (5,), "softplus", num_features=3), 0.3, seed=1)
    dde.compile(SGD(learning_rate), **options)
    return dde


def make_egm(learning_rate=0.01, **options):
    generator = build_generator(widths=(5,), num_features=3)
    nets = [build_energy_net(2, True, (5,), "softplus", num_features=3, seed=seed) for seed in (1, 2)]
    egm = EGM(*(DDE(net, (0.2, 1.5), seed=1) for net in nets), generator, dde_steps=2, seed=1)
    egm.compile(SGD(learning_rate), SGD(learning_rate), **options)
    return egm


def with_entry(value, row=2):
    x = normal(6, 2)
    x[row, 1] = value
    return x


class Nullable:
    """A table whose values may be missing, as those of pandas with nullable columns."""

    def __init__(self, kind, values):
        self.dtypes, self.values = [SimpleNamespace(kind=kind)], np.array(values, object)

    def __array__(self, dtype=None, copy=None):
        return self.values

    def to_numpy(self, dtype, na_value):
        return np.where(self.values == None, na_value, self.values).astype(dtype)  # noqa: E711


BAD_DATA = {
    "None": (None, "must be an array or batches of points, got a NoneType"),
    "NaN": (with_entry(np.nan), r"NaN.* in 1 of 6 points, first at index 2: \["),
    "infinity": (with_entry(-np.inf, row=4), "first at index 4"),
    "a masked value": (np.ma.array(normal(6, 2), mask=np.eye(6, 2, -2)), "in 2 of 6 points, first at index 2"),
    "a masked integer": (np.ma.array(np.ones((6, 2), int), mask=np.eye(6, 2, -3)), "in 2 of 6 points.* index 3"),
    "a missing value": (Nullable("i", [[1, 2], [None, 4]]), "in 1 of 2 points, first at index 1"),
    "nullable text": (Nullable("O", [["1", "2"]]), "must be real numbers .* got object"),
    "too large for float32": (np.full((6, 2), 1e39), "too large for float32 in 6 of 6"),
    "too large for its noise": (normal(6, 2) + 1e8, r"lie 8 apart, too far for a noise_std of 0\.[23]: subtract"),
    "rounded": (np.float16(normal(6, 2) + 1000), r"lie 0\.5 apart, too far for a noise_std of 0\.[23]"),
    "no points": (np.zeros((0, 2)), r"at least one point, got shape \(0, 2\)"),
    "a number": (1.0, r"must have shape \(n, 2\), got \(\)"),
    "a vector": (normal(6), r"must have shape \(n, 2\), got \(6,\)"),
    "another dimension": (normal(6, 3), r"must have shape \(n, 2\), got \(6, 3\)"),
    "two arrays": ([normal(6, 2), normal(6, 2)], r"must have shape \(n, 2\), got \(2, 6, 2\)"),
    "ragged lists": ([[1.0, 2.0], [3.0]], "must be an array of points"),
    "text": (np.array([["a", "b"]]), "must be real numbers .* got <U1"),
    "booleans": (np.ones((6, 2), bool), "must be real numbers .* got bool"),
    "complex numbers": (np.ones((6, 2), complex), "must be real numbers .* got complex128"),
    "a dict": ({"x": normal(6, 2)}, "must be an array or batches of points, got a dict"),
    "an empty dataset": (tf.data.Dataset.from_tensor_slices(np.zeros((0, 2))).batch(2), "at least one batch"),
    "an endless dataset": (tf.data.Dataset.from_tensors(normal(6, 2)).repeat(), "endless .* steps_per_epoch"),
    "a dataset without batches": (tf.data.Dataset.from_tensor_slices(normal(6, 2)), r"\(batch, 2\), got \(2,\)"),
    "a dataset of other points": (tf.data.Dataset.from_tensors(normal(6, 3)), r"\(batch, 2\), got \(6, 3\)"),
    "a dataset of text": (tf.data.Dataset.from_tensors([["a", "b"]]), "must be real numbers.* got string"),
}


@pytest.fixture(scope="module")
def models():
    return [make_dde(), make_egm()]


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_are_refused_and_change_nothing(name, models):
    x, message = BAD_DATA[name]
    for model in models:
        before = model.get_weights()
        with pytest.raises(ValueError, match=message):
            model.fit(x, verbose=0)
        assert_equal_arrays(model.get_weights(), before)


@pytest.mark.parametrize("name", ["NaN", "no points", "another dimension", "text", "too large for its noise"])
def test_bad_data_are_refused_everywhere(name, models):
    x, message = BAD_DATA[name]
    with pytest.raises(ValueError, match=message):
        models[0].evaluate(x, verbose=0)
    with pytest.raises(ValueError, match="validation_data"):
        models[0].fit(normal(6, 2), validation_data=x, verbose=0)


CONTAINERS = {
    "array": np.asarray,
    "dataset": lambda x: tf.data.Dataset.from_tensor_slices(x).batch(3),
    "dataset of unknown length": lambda x: tf.data.Dataset.from_tensor_slices(x).filter(lambda _: True).batch(3),
    "dataset of pairs": lambda x: tf.data.Dataset.from_tensor_slices((x, x)).batch(3),
    "PyDataset": Batches,
    "generator": lambda x: ((batch,) for batch in np.split(x, 2)),
}


def units_warned_of(model, x, **options):
    """The names of the networks that training warns were built for other data."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(x, verbose=0, **options)
    messages = [str(each.message) for each in found]
    return [message.split()[0] for message in messages if "was built for data with mean" in message]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_data_far_from_zero_are_refused_or_warned_of_in_any_container(kind, models):
    dde, container, before = models[0], CONTAINERS[kind], models[0].get_weights()
    for x in (normal(6, 2) + 1e8, np.float16(normal(6, 2) + 1000)):
        with pytest.raises(ValueError, match=r"x are .* too far for a noise_std of 0\.3: subtract the mean"):
            dde.fit(container(x), verbose=0)
    assert_equal_arrays(before, dde.get_weights())
    shifted = normal(6, 2) + np.float32([0, 290])
    message = r"net was built for data with mean 0 and standard deviation 2, and column 1 of x has mean 2\d\d.* data=x"
    with pytest.warns(UserWarning, match=message):
        make_dde(1e-9).fit(container(shifted), verbose=0)
    fitting = DDE(build_energy_net(data=shifted, widths=(5,), num_features=3), 0.3)
    fitting.compile()
    for quiet, x in ((make_dde(1e-9), normal(6, 2)), (fitting, shifted)):
        assert units_warned_of(quiet, container(x)) == []


def test_data_of_other_units_are_warned_of_for_each_network():
    x, names = 1e3 + normal(64, 2), ("dde_real", "dde_fake", "generator")
    builders = [partial(build_energy_net, widths=(5,), seed=seed) for seed in (0, 1)] + [build_generator]
    for is_default in [*np.eye(3, dtype=int), np.ones(3, int)]:
        nets = (build(data=None if default else x) for build, default in zip(builders, is_default, strict=True))
        real, fake, generator = nets
        egm = EGM(DDE(real, 0.3), DDE(fake, 0.3), generator, dde_steps=1)
        egm.compile(SGD(1e-9), SGD(1e-9), run_eagerly=True)
        assert units_warned_of(egm, x, batch_size=64) == list(itertools.compress(names, is_default))
    for x, expected in ((5.0 * normal(64, 2), ["net"]), (0.1 * normal(64, 2), ["net"]), (3 + normal(64, 2), [])):
        assert units_warned_of(make_dde(1e-9), x) == expected


OPTIONS = [{}, {"jit_compile": True}, {"steps_per_execution": 3}, {"run_eagerly": True}]
FAST = ({}, {"run_eagerly": True})
WAYS = [pytest.param(make_dde, options, marks=() if options in FAST else pytest.mark.slow) for options in OPTIONS]
WAYS += [pytest.param(make_egm, options, marks=pytest.mark.slow) for options in OPTIONS]


STOPPED = "is not finite: training has stopped at step {}, and the weights"


@pytest.mark.parametrize(("make_model", "options"), WAYS)
def test_bad_batches_stop_training_at_their_step(make_model, options):
    batches = normal(6, 4, 2)
    batches[3, 1, 0] = np.nan
    model, reference = make_model(**options), make_model(**options)
    reference.fit(tf.data.Dataset.from_tensor_slices(batches[:3]), verbose=0)
    compiled_egm = make_model is make_egm and "jit_compile" in options
    with pytest.raises(FloatingPointError, match=STOPPED.format(r"\d" if compiled_egm else 4)):
        model.fit(tf.data.Dataset.from_tensor_slices(batches), verbose=0)
    if compiled_egm:  # the networks that do not meet the bad points make the step
        model, reference = model.dde_real, reference.dde_real
    assert_equal_arrays(model.get_weights(), reference.get_weights())


def assert_finite(model):
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.parametrize(("make_model", "options"), WAYS)
def test_diverging_training_stops_with_finite_weights(make_model, options):
    model = make_model(learning_rate=1e18, **options)
    with pytest.raises(FloatingPointError, match=STOPPED.format(r"\d+")):
        model.fit(normal(40, 2), batch_size=4, epochs=10, verbose=0)
    assert_finite(model)
    assert model.num_steps < 100


def test_a_loop_written_by_hand_stops_too():
    dde = make_dde(learning_rate=1e18)
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not finite"):
        for _ in range(100):
            dde.train_on_batch(normal(8, 2))
    assert_finite(dde)


def test_terminate_on_nan_ends_quietly_what_xla_cannot_stop():
    dde = make_dde(learning_rate=1e18, jit_compile=True)
    history = dde.fit(normal(40, 2), batch_size=4, epochs=10, verbose=0, callbacks=keras.callbacks.TerminateOnNaN())
    assert np.isnan(history.history["loss"][-1]) and len(history.epoch) < 10
    assert_finite(dde)


WEIGHTED = tf.data.Dataset.from_tensors((normal(6, 2), np.zeros(6), np.ones(6)))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fit", {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ("fit", {"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ("fit", {"steps_per_epoch": -1}, "steps_per_epoch must be an integer of at least 1, got -1"),
        ("fit", {"sample_weight": np.ones(6)}, "sample_weight are not supported"),
        ("fit", {"class_weight": {0: 1.0}}, "class_weight and sample_weight are not supported"),
        ("fit", {"x": WEIGHTED}, "weights are not supported"),
        ("evaluate", {"sample_weight": np.ones(6)}, "sample_weight is not supported"),
        ("fit", {"validation_split": 1.0}, "validation_split must be .* at least 0 and less than 1, got 1.0"),
        ("fit", {"validation_split": -0.5}, "validation_split must be .* at least 0 and less than 1, got -0.5"),
        ("compile", {"loss": "mse"}, "loss cannot be given"),
        ("compile", {"metrics": ["mse"]}, "metrics cannot be given"),
    ],
    ids=str,
)
def test_bad_options_are_refused(method, options, message, models):
    for model in models:
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(**({} if method == "compile" else {"x": normal(6, 2), "verbose": 0}) | options)


def test_targets_are_ignored():
    x, weights = normal(6, 2), []
    batches = tf.data.Dataset.from_tensors((x, np.zeros(6)))
    for data, batch_size in (((x,), 6), ((x, np.zeros(6)), 6), ((batches,), None)):
        dde = make_dde()
        dde.fit(*data, batch_size=batch_size, shuffle=False, verbose=0)
        weights.append(dde.get_weights())
    for expected, given, batched in zip(*weights, strict=True):
        np.testing.assert_allclose([given, batched], [expected] * 2, rtol=1e-5, atol=1e-8)  # graphs round otherwise


def test_training_needs_compile():
    ddes = [DDE(build_energy_net(seed=seed), 0.1) for seed in (0, 1)]
    for model in (ddes[0], EGM(*ddes, build_generator())):
        with pytest.raises(ValueError, match=r"call compile\(\) before fit\(\): this (DDE|EGM) has no optimizer"):
            model.fit(normal(6, 2))


# ---------------------------------------------------------------------------------------------- networks


def net_with(*layers, shape=(2,)):
    return keras.Sequential([keras.Input(shape), *layers, keras.layers.Dense(1, use_bias=False)])


LINEAR_PIECES = [keras.layers.Dense(4, name) for name in ("relu", "leaky_relu", "relu6", "hard_tanh", "hard_sigmoid")]
LINEAR_PIECES += [keras.layers.ReLU(), keras.layers.LeakyReLU(), keras.layers.PReLU(), keras.layers.Activation("relu")]
LINEAR_PIECES += [keras.Sequential([keras.layers.Dense(4, "relu")])]


def test_piecewise_linear_energy_nets_alone_are_warned_of():
    for layer in LINEAR_PIECES:
        with pytest.warns(UserWarning, match="piecewise linear: the score .* use a smooth .* such as tanh") as warned:
            DDE(net_with(layer), 0.1)
        assert warned[0].filename == __file__, layer.name  # of the line that made the DDE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for activation in ("tanh", "silu", "gelu", "softplus", "elu", "sigmoid", "exponential", None):
            DDE(net_with(keras.layers.Dense(4, activation)), 0.1)
        EGM(*(DDE(net_with(), 0.1) for _ in range(2)), build_generator(activation="relu"))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda x: [keras.layers.Dense(1)(x), keras.layers.Dense(1)(x)], r"must have 1 output\(s\).* got 2"),
        (lambda x: keras.layers.Dense(1)(x)[:, 0], "one number a point"),
        (
            keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(1)]),
            r"batch normalization \(.*\): it makes the log density of a point depend",
        ),
    ],
    ids=["two outputs", "no axis", "batch normalization"],
)
def test_networks_that_are_no_density_are_refused(head, message):
    x = keras.Input((2,))
    with pytest.raises(ValueError, match=message):
        DDE(keras.Model(x, head(x)), 0.1)


@pytest.fixture
def dtype_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def test_half_precision_is_refused(dtype_policy):
    for policy in ("mixed_float16", "float16"):
        dtype_policy(policy)
        with pytest.raises(ValueError, match=r"must not compute in float16 .* use float32, float64 or mixed_bfloat16"):
            make_dde()


@pytest.mark.parametrize("policy", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "float64"])
def test_other_precisions_train(policy, dtype_policy):
    expected = make_egm().dde_real
    dtype_policy(policy)
    egm = make_egm()
    dtype = "float64" if policy == "float64" else "float32"
    x = normal(64, 2)
    egm.dde_real.net.set_weights(expected.net.get_weights())
    for value, reference in zip(egm.dde_real(x), expected(x), strict=True):
        assert value.dtype == dtype
        np.testing.assert_allclose(value, reference, rtol=0.05, atol=0.05)
    history = egm.fit(x, batch_size=16, epochs=2, verbose=0).history
    assert np.isfinite(list(history.values())).all()
    assert egm.sample(4).dtype == dtype


# ---------------------------------------------------------------------------------------------- anything goes

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bfloat16"]


@hypothesis.given(
    dtype=st.sampled_from(DTYPES),
    event_shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
    n_points=st.integers(1, 9),
    batch_size=st.integers(1, 12),
    noise_std=st.floats(0.05, 3.0),
    kind=st.sampled_from(["array", "tensor", "list", "dataset"]),
)
@pytest.mark.slow
@hypothesis.settings(max_examples=25)
def test_points_of_any_shape_type_and_number_train(dtype, event_shape, n_points, batch_size, noise_std, kind):
    x = tf.cast(3.0 * normal(n_points, *event_shape), dtype)
    batches = tf.data.Dataset.from_tensor_slices(x).batch(batch_size)
    data = {"array": x.numpy(), "tensor": x, "list": x.numpy().tolist(), "dataset": batches}[kind]
    dde = DDE(net_with(keras.layers.Flatten(), keras.layers.Dense(4, "tanh"), shape=event_shape), noise_std, seed=0)
    dde.compile(Adam(1e-3), run_eagerly=True)
    before = dde.get_weights()
    history = dde.fit(data, batch_size=None if kind == "dataset" else batch_size, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert dde.num_steps == -(-n_points // batch_size)
    assert differ(dde.get_weights(), before)
    log_density, score = dde(x)
    assert log_density.shape == (n_points, 1) and score.shape == x.shape
    assert np.isfinite(log_density).all() and np.isfinite(score).all()


@hypothesis.given(
    x=hnp.arrays(
        dtype=st.sampled_from(["float16", "float32", "float64", "int32", "bool", "complex64", "U2"]),
        shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    noise_std=st.floats(1e-3, 10.0),
)
@hypothesis.settings(max_examples=300)
def test_data_are_taken_as_they_are_or_refused(x, noise_std):
    try:
        points = check_points("x", x, (2,), "float32", noise_std)
    except ValueError as error:
        assert str(error).startswith("x must") or "x are as large as" in str(error)
        return
    assert points.dtype == "float32"
    assert points.shape == x.shape
    assert x.ndim == 2 and x.shape[1] == 2 and len(x) > 0
    assert np.abs(points.astype(float) - x.astype(float)).max() <= 0.1 * noise_std
