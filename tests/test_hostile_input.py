"""Data, networks and settings that must end in a clear error, or work."""

import itertools
import warnings
from types import SimpleNamespace

import hypothesis
import hypothesis.extra.numpy as hnp
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st
from keras.optimizers import SGD, Adam
from small_models import assert_equal_arrays, normal

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


class Nothing:
    """Something that is no data at all."""


class Nullable:
    """A table whose values may be missing, as those of pandas with nullable columns."""

    def __init__(self, dtype, values):
        self.dtypes, self.values = [SimpleNamespace(kind={"Int64": "i"}.get(dtype, "O"))], np.array(values, object)

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
    "a missing value": (Nullable("Int64", [[1, 2], [None, 4]]), "in 1 of 2 points, first at index 1"),
    "nullable text": (Nullable("string", [["1", "2"]]), "must be real numbers .* got object"),
    "too large for float32": (np.full((6, 2), 1e39), "too large for float32 in 6 of 6"),
    "too large for its noise": (normal(6, 2) + 1e8, r"lie 8 apart, too far for a noise_std of 0\.3: subtract the mean"),
    "rounded": (np.float16(normal(6, 2) + 1000), r"lie 0\.5 apart, too far for a noise_std of 0\.3"),
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
    "an object": (Nothing(), "must be an array or batches of points, got a Nothing"),
    "an empty dataset": (tf.data.Dataset.from_tensor_slices(np.zeros((0, 2))).batch(2), "at least one batch"),
    "an endless dataset": (tf.data.Dataset.from_tensors(normal(6, 2)).repeat(), "endless .* steps_per_epoch"),
    "a dataset without batches": (tf.data.Dataset.from_tensor_slices(normal(6, 2)), r"\(batch, 2\), got \(2,\)"),
    "a dataset of other points": (
        tf.data.Dataset.from_tensors(normal(6, 3)),
        r"\(batch, 2\), got \(None, 3\)|\(6, 3\)",
    ),
    "a dataset of text": (tf.data.Dataset.from_tensors([["a", "b"]]), "must be real numbers.* got string"),
}


@pytest.fixture(name="models", scope="module")
def models_fixture():
    return [make_dde(), make_egm()]


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_are_refused_and_change_nothing(name, models):
    x, message = BAD_DATA[name]
    for model in models[: 1 if name in ("too large for its noise", "rounded") else 2]:  # the EGM has another noise
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


class Batches(keras.utils.PyDataset):
    """Batches of three points."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return -(-len(self.x) // 3)

    def __getitem__(self, index):
        return (self.x[3 * index : 3 * index + 3],)


CONTAINERS = {
    "array": np.asarray,
    "dataset": lambda x: tf.data.Dataset.from_tensor_slices(x).batch(3),
    "dataset of unknown length": lambda x: tf.data.Dataset.from_tensor_slices(x).filter(lambda _: True).batch(3),
    "dataset of pairs": lambda x: tf.data.Dataset.from_tensor_slices((x, x)).batch(3),
    "PyDataset": Batches,
    "generator": lambda x: ((x[start : start + 3],) for start in range(0, len(x), 3)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_data_far_from_zero_are_refused_or_warned_of_in_any_container(kind, models):
    dde, container, before = models[0], CONTAINERS[kind], models[0].get_weights()
    for x in (normal(6, 2) + 1e8, np.float16(normal(6, 2) + 1000)):
        with pytest.raises(
            ValueError, match=r"x are as large as .* too far for a noise_std of 0\.3: subtract the mean"
        ):
            dde.fit(container(x), verbose=0)
    assert_equal_arrays(before, dde.get_weights())
    shifted = normal(6, 2) + np.float32([0, 290])
    message = r"net was built for data with mean 0 and standard deviation 2, and column 1 of x has mean 2\d\d.* data=x"
    with pytest.warns(UserWarning, match=message):
        make_dde(1e-9).fit(container(shifted), verbose=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was built for data")
        net = build_energy_net(data=shifted, widths=(5,), num_features=3)
        for quiet, x in ((make_dde(1e-9), normal(6, 2)), (DDE(net, 0.3), shifted)):
            quiet.compile()
            quiet.fit(container(x), verbose=0)


def test_data_of_other_units_are_warned_of_for_each_network():
    x = 1e3 + normal(64, 2)
    built = [build_energy_net(data=x, widths=(5,), seed=seed) for seed in (0, 1)] + [build_generator(data=x)]
    default = [build_energy_net(widths=(5,)), build_energy_net(widths=(5,), seed=1), build_generator()]
    for chosen in itertools.product((0, 1), repeat=3):
        real, fake, generator = ((built, default)[is_default][i] for i, is_default in enumerate(chosen))
        egm = EGM(DDE(real, 0.3), DDE(fake, 0.3), generator, dde_steps=1)
        egm.compile(SGD(1e-9), SGD(1e-9), run_eagerly=True)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            egm.fit(x, batch_size=64, verbose=0)
        names = ("dde_real", "dde_fake", "generator")
        expected = [name for name, is_default in zip(names, chosen, strict=True) if is_default]
        assert [str(each.message).split()[0] for each in found if "built for" in str(each.message)] == expected
    for x, is_far in ((5.0 * normal(64, 2), True), (0.1 * normal(64, 2), True), (3 + normal(64, 2), False)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            make_dde(1e-9).fit(x, verbose=0)
        assert any("built for" in str(each.message) for each in found) == is_far


OPTIONS = [{}, {"jit_compile": True}, {"steps_per_execution": 3}, {"run_eagerly": True}]
FAST = ({}, {"run_eagerly": True})
WAYS = [pytest.param(make_dde, options, marks=() if options in FAST else pytest.mark.slow) for options in OPTIONS]
WAYS += [pytest.param(make_egm, options, marks=pytest.mark.slow) for options in OPTIONS]


@pytest.mark.parametrize(("make_model", "options"), WAYS)
def test_bad_batches_stop_training_at_their_step(make_model, options):
    batches = normal(6, 4, 2)
    batches[3, 1, 0] = np.nan
    model, reference = make_model(**options), make_model(**options)
    reference.fit(tf.data.Dataset.from_tensor_slices(batches[:3]), verbose=0)
    compiled_egm = make_model is make_egm and "jit_compile" in options
    step = r"\d" if compiled_egm else "4"
    with pytest.raises(
        FloatingPointError, match=f"is not finite: training has stopped at step {step}, and the weights"
    ):
        model.fit(tf.data.Dataset.from_tensor_slices(batches), verbose=0)
    if compiled_egm:  # the networks that do not meet the bad points make the step
        model, reference = model.dde_real, reference.dde_real
    assert_equal_arrays(model.get_weights(), reference.get_weights())


@pytest.mark.parametrize(("make_model", "options"), WAYS)
def test_diverging_training_stops_with_finite_weights(make_model, options):
    model = make_model(learning_rate=1e18, **options)
    with pytest.raises(FloatingPointError, match=r"is not finite: training has stopped at step \d+, and the weights"):
        model.fit(normal(40, 2), batch_size=4, epochs=10, verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert model.num_steps < 100


def test_a_loop_written_by_hand_stops_too():
    dde = make_dde(learning_rate=1e18)
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not finite"):
        for _ in range(100):
            dde.train_on_batch(normal(8, 2))
    assert all(np.isfinite(weight).all() for weight in dde.get_weights())


def test_terminate_on_nan_ends_quietly_what_xla_cannot_stop():
    dde = make_dde(learning_rate=1e18, jit_compile=True)
    history = dde.fit(normal(40, 2), batch_size=4, epochs=10, verbose=0, callbacks=keras.callbacks.TerminateOnNaN())
    assert np.isnan(history.history["loss"][-1])
    assert len(history.epoch) < 10
    assert all(np.isfinite(weight).all() for weight in dde.get_weights())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"steps_per_epoch": -1}, "steps_per_epoch must be an integer of at least 1, got -1"),
        ({"sample_weight": np.ones(6)}, "sample_weight are not supported"),
        ({"class_weight": {0: 1.0}}, "class_weight and sample_weight are not supported"),
        ({"validation_split": 1.0}, "validation_split must be .* at least 0 and less than 1, got 1.0"),
        ({"validation_split": -0.5}, "validation_split must be .* at least 0 and less than 1, got -0.5"),
    ],
    ids=str,
)
def test_bad_options_of_fit_are_refused(options, message, models):
    with pytest.raises(ValueError, match=message):
        models[0].fit(normal(6, 2), verbose=0, **options)


def test_batches_with_weights_are_refused(models):
    x = normal(6, 2)
    batches = tf.data.Dataset.from_tensors((x, np.zeros(6), np.ones(6)))
    for model in models:
        with pytest.raises(ValueError, match="weights are not supported"):
            model.fit(batches, verbose=0)
        with pytest.raises(ValueError, match="sample_weight is not supported"):
            model.evaluate(x, sample_weight=np.ones(6), verbose=0)


def test_targets_are_ignored():
    x = normal(6, 2)
    expected, given, batched = make_dde(), make_dde(), make_dde()
    expected.fit(x, batch_size=6, shuffle=False, verbose=0)
    given.fit(x, np.zeros(6), batch_size=6, shuffle=False, verbose=0)
    batched.fit(tf.data.Dataset.from_tensors((x, np.zeros(6))), verbose=0)
    for other in (given, batched):
        for weight, same in zip(expected.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(weight, same, rtol=1e-5, atol=1e-8)  # other shapes are known to the graph


def test_training_needs_compile():
    net = build_energy_net()
    for model in (DDE(net, 0.1), EGM(DDE(net, 0.1), DDE(build_energy_net(), 0.1), build_generator())):
        with pytest.raises(ValueError, match=r"call compile\(\) before fit\(\): this (DDE|EGM) has no optimizer"):
            model.fit(normal(6, 2))


@pytest.mark.parametrize("option", ["loss", "metrics"])
def test_losses_are_built_in(option):
    with pytest.raises(ValueError, match=f"{option} cannot be given"):
        make_dde(**{option: ["mse"]})


# ---------------------------------------------------------------------------------------------- networks


def net_with(*layers):
    return keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(1, use_bias=False)])


@pytest.mark.parametrize(
    "layer",
    [
        *(keras.layers.Dense(4, name) for name in ("relu", "leaky_relu", "relu6", "hard_tanh", "hard_sigmoid")),
        *(keras.layers.ReLU(), keras.layers.LeakyReLU(), keras.layers.PReLU(), keras.layers.Activation("relu")),
        keras.Sequential([keras.layers.Dense(4, "relu")]),
    ],
    ids=lambda layer: layer.name,
)
def test_piecewise_linear_energy_nets_are_warned_of(layer):
    message = "piecewise linear: the score .* use a smooth activation such as tanh"
    with pytest.warns(UserWarning, match=message) as warned:
        DDE(net_with(layer), 0.1)
    assert warned[0].filename == __file__  # of the line that made the DDE


@pytest.mark.parametrize("activation", ["tanh", "silu", "gelu", "softplus", "elu", "sigmoid", "exponential", None])
def test_smooth_energy_nets_are_not(activation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDE(net_with(keras.layers.Dense(4, activation)), 0.1)
        EGM(*(DDE(net_with(), 0.1) for _ in range(2)), build_generator(activation="relu"))


def test_energy_nets_with_batch_normalization_are_refused():
    with pytest.raises(ValueError, match=r"batch normalization \(.*\): it makes the log density of a point depend"):
        DDE(net_with(keras.Sequential([keras.layers.BatchNormalization()])), 0.1)


@pytest.mark.slow
def test_layers_that_differ_in_training_do():
    dde = DDE(net_with(keras.layers.Dense(5, "tanh"), keras.layers.Dropout(0.9)), 0.3, seed=0)
    dde.compile(SGD(0.0))
    x = normal(64, 2)
    losses = [dde.train_on_batch(x) for _ in range(2)]  # a rate of zero: noise and dropout alone differ
    assert losses[0] != losses[1]
    np.testing.assert_array_equal(dde.log_density(x), dde.log_density(x))
    generator = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    egm = EGM(*(DDE(net_with(), 0.3) for _ in range(2)), generator)
    egm.compile()
    egm.fit(x, epochs=3, verbose=0)
    moving_mean = next(weight for weight in egm.generator.weights if "moving_mean" in weight.path)
    assert (moving_mean.numpy() != 0).all()
    assert np.isfinite(egm.sample(5)).all()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda h: [keras.layers.Dense(1)(h), keras.layers.Dense(1)(h)], r"must have 1 output\(s\).* got 2"),
        (lambda h: h[:, 0], r"one number a point"),
    ],
    ids=["two", "no axis"],
)
def test_networks_with_other_outputs_are_refused(head, message):
    x = keras.Input((2,))
    with pytest.raises(ValueError, match=message):
        DDE(keras.Model(x, head(x)), 0.1)


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_half_precision_is_refused(policy, dtype_policy):
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
    history = egm.fit(x, batch_size=16, epochs=2, verbose=0)
    assert np.isfinite(list(history.history.values())).all()
    assert egm.sample(4).dtype == dtype


@pytest.fixture(name="dtype_policy")
def dtype_policy_fixture():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


# ---------------------------------------------------------------------------------------------- anything goes

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bfloat16"]


@hypothesis.given(
    dtype=st.sampled_from(DTYPES),
    event_shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
    n_points=st.integers(1, 9),
    batch_size=st.integers(1, 12),
    noise_std=st.one_of(st.floats(0.05, 3.0), st.tuples(st.floats(0.05, 0.5), st.floats(0.6, 5.0))),
    kind=st.sampled_from(["array", "tensor", "list", "dataset"]),
)
@pytest.mark.slow
@hypothesis.settings(max_examples=25)
def test_points_of_any_shape_type_and_number_train(dtype, event_shape, n_points, batch_size, noise_std, kind):
    x = tf.cast(3.0 * normal(n_points, *event_shape), dtype)
    data = {
        "array": lambda: x.numpy(),
        "tensor": lambda: x,
        "list": lambda: x.numpy().tolist(),
        "dataset": lambda: tf.data.Dataset.from_tensor_slices(x).batch(batch_size),
    }[kind]()
    dde = DDE(net_of_events(event_shape, isinstance(noise_std, tuple)), noise_std, seed=0)
    dde.compile(Adam(1e-3), run_eagerly=True)
    before = dde.get_weights()
    history = dde.fit(data, batch_size=None if kind == "dataset" else batch_size, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert dde.num_steps == -(-n_points // batch_size)
    assert any((weight != old).any() for weight, old in zip(dde.get_weights(), before, strict=True))
    log_density, score = dde(x)
    assert log_density.shape == (n_points, 1)
    assert score.shape == x.shape
    assert np.isfinite(log_density).all() and np.isfinite(score).all()
    expected, given = dde.denoise(x), tf.cast(x, tf.float32) + dde.noise_range[0] ** 2 * score
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def net_of_events(event_shape, in_range):
    x = keras.Input(event_shape)
    hidden = keras.layers.Flatten()(x)
    inputs = x
    if in_range:
        log_noise_std = keras.Input((1,))
        hidden = keras.layers.Concatenate()([hidden, log_noise_std])
        inputs = [x, log_noise_std]
    hidden = keras.layers.Dense(4, "tanh")(hidden)
    return keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(hidden))


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
