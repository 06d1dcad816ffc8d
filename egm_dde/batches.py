"""The order of the data: a function of the seed and the number of steps made, which a resumed run repeats."""

import contextlib
import functools
import math
import numbers
import re

import keras
import numpy as np
import tensorflow as tf

NO_AUTOTUNING = tf.data.Options()  # its thread sleeps for up to a minute, and the end of fit would wait for it
NO_AUTOTUNING.autotune.enabled = False


def is_array(x):
    """Whether data are an array, or what NumPy makes one of."""
    return hasattr(x, "__array__") or isinstance(x, (list, tuple, numbers.Number))


def points_of(batch):
    """The points of a batch, in whatever form Keras passes it on: x, (x,) or (x, y)."""
    x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    if sample_weight is not None:
        raise ValueError("sample weights are not supported: each point weighs the same")
    return x


def make_batches(model, x, batch_size, shuffle, steps_per_epoch):
    """Make batches of an array (n, *event), in an order set by the model's seed and its steps before each pass.

    On several devices, points that fill no batch are left out. With ``steps_per_epoch``, an epoch begins within a pass
    where the last one stopped. Returns the ``tf.data.Dataset`` of an epoch and its length.
    """
    num_replicas = model.distribute_strategy.num_replicas_in_sync
    batches_per_pass = len(x) // batch_size if num_replicas > 1 else math.ceil(len(x) / batch_size)
    if not batches_per_pass or batch_size % num_replicas:
        allowed = f"a multiple of {num_replicas} and at most the number of points, {len(x)}"
        raise ValueError(f"on {num_replicas} devices, batch_size must be {allowed}; got {batch_size}")
    num_batches = steps_per_epoch or batches_per_pass
    shape = (None, *x.shape[1:])  # of a batch

    @functools.lru_cache(maxsize=1)
    def order_pass(first_step):
        return np.random.default_rng((model.seed, first_step)).permutation(len(x)) if shuffle else np.arange(len(x))

    def take(first_step, step):
        first_step, step = int(first_step), int(step)
        batch = (step if steps_per_epoch else step - first_step) % batches_per_pass
        return x[order_pass(step - batch)[batch * batch_size : (batch + 1) * batch_size]]

    def continue_from(first_step):
        steps = tf.data.Dataset.range(first_step, first_step + num_batches)
        return steps.map(lambda step: tf.ensure_shape(tf.numpy_function(take, (first_step, step), x.dtype), shape))

    batches = ask_late(lambda: model.num_steps).flat_map(continue_from)
    return batches.with_options(NO_AUTOTUNING).apply(tf.data.experimental.assert_cardinality(num_batches)), num_batches


def ask_late(function):
    """A dataset of one integer, asked for when iteration begins; ``from_generator`` would undo ``prepare_process``."""
    return tf.data.Dataset.range(1).map(lambda _: tf.numpy_function(lambda: np.int64(function()), [], tf.int64))


class Position(keras.callbacks.Callback):
    """The place of one ``fit`` in its data, be it begun by this process or by one that was interrupted."""

    def __init__(self, model, initial_epoch):
        super().__init__()
        self.set_model(model)
        self.steps_at_start, self.initial_epoch = model.num_steps, initial_epoch
        self.steps_per_epoch = self.position = None  # where the data do not know their length, they stay None
        self.refusal = None  # the error about a batch, which TensorFlow would wrap in one of its own

    def continue_dataset(self, dataset, steps_per_epoch):
        """Repeat a ``tf.data.Dataset`` from the batch on that comes next, which is known only when training begins."""
        spec = dataset.element_spec[0] if isinstance(dataset.element_spec, tuple) else dataset.element_spec
        if not isinstance(spec, tf.TensorSpec):
            raise ValueError(f"a batch of x must be one tensor of points, got {spec}")
        if not (spec.dtype.is_floating or spec.dtype.is_integer):
            raise ValueError(f"x must be real numbers (floats or integers), got {spec.dtype.name}")
        length, options = int(dataset.cardinality()), dataset.options()
        if length == 0:
            raise ValueError("x must hold at least one batch, got an empty tf.data.Dataset")
        if length == tf.data.INFINITE_CARDINALITY and steps_per_epoch is None:
            raise ValueError("x is an endless tf.data.Dataset: say how many steps_per_epoch to take from it")
        at_once = self.model.steps_per_execution
        if steps_per_epoch and steps_per_epoch % at_once:
            allowed = f"a multiple of steps_per_execution={at_once}"
            raise ValueError(f"steps_per_epoch must be {allowed}, got {steps_per_epoch}")
        if not steps_per_epoch and (length < 0 or length % at_once):  # nobody knows its length, or the last steps
            return dataset.enumerate().map(self.look_at_first), None  # are fewer than those at once
        self.steps_per_epoch = steps_per_epoch or length
        batches = ask_late(lambda: self.position or 0).flat_map(lambda position: dataset.repeat().skip(position))
        batches = batches.enumerate().map(self.look_at_first)
        return batches.with_options(NO_AUTOTUNING).with_options(options), self.steps_per_epoch

    def look_at_first(self, index, batch):
        """Return a batch of a ``tf.data.Dataset``; the first one is checked as an array is."""

        def check(points):
            try:
                self.model.check_data("x", points, warns=True)
            except ValueError as error:
                self.refusal = error
                raise
            return np.int64(0)

        look = tf.cond(index == 0, lambda: tf.numpy_function(check, [points_of(batch)], tf.int64), lambda: index)
        with tf.control_dependencies([look]):
            return tf.nest.map_structure(tf.identity, batch)

    @contextlib.contextmanager
    def naming_what_is_wrong(self):
        """Turn TensorFlow's error about a batch, or a number that is not finite, into one that says what and where."""
        try:
            yield
        except tf.errors.OpError as error:
            if self.refusal:
                raise self.refusal from None
            found = re.search(r"([^\s:}][^\n:}]*) is not finite", error.message)
            if not found:
                raise
            raise not_finite(found[1], self.model.num_steps) from error

    def on_train_begin(self, logs=None):
        if self.steps_per_epoch is None:
            return
        # BackupAndRestore writes two files, which a kill leaves disagreeing: trust the step count of the weights.
        self.position = self.model.num_steps - self.steps_at_start + self.initial_epoch * self.steps_per_epoch
        if self.position < 0:  # steps that this process made are given up
            self.position = (self.model._initial_epoch or 0) * self.steps_per_epoch
        self.model._initial_epoch = self.position // self.steps_per_epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.model.jit_compile and not self.model.stop_training:  # XLA leaves out the checks within a step
            bad = [name for name, value in logs.items() if not np.isfinite(value)]
            if bad:
                raise not_finite(bad[0], self.model.num_steps)


def not_finite(name, num_steps):
    """The error for a number that is not finite."""
    return FloatingPointError(
        f"{name} is not finite: training has stopped at step {num_steps + 1}, and the weights are those before it. "
        "Common causes are a learning rate that is too high, and data that are not finite or far from all others."
    )
