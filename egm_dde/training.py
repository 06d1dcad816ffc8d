"""Trainable: what DDE and EGM share while they train and are saved, so that interruptions and bad data cost nothing.

* The data come in an order that depends on the seed and the number of steps made, as the noise does: a run that is
  killed and resumed at the end of an epoch goes on as if nothing had happened.
* Bad data, and numbers that stop being finite, end in an error before they reach a weight.
* Files are replaced as a whole or not at all.
"""

import itertools
import math
import types
import warnings
from pathlib import Path

import keras
import tensorflow as tf

from egm_dde import checks
from egm_dde.batches import Position, is_array, make_batches, points_of
from egm_dde.files import NamedMemory, check_archive, replacing


class Trainable(keras.Model):
    """A ``keras.Model`` with a built-in loss, whose training can be resumed exactly and whose files are never torn.

    ``step`` is the number of training steps made, a weight that is saved with the others and never set back: noise and
    the order of the data follow from it and ``seed``. Subclasses have ``event_shape``, the shape of a point, or None
    while it is not known; ``noise_range``, the lowest and the highest noise level; and ``networks``.
    """

    def __init__(self, seed, **kwargs):
        # The layers of the networks cast by themselves; points, noise and losses stay exact.
        super().__init__(autocast=False, **kwargs)
        self.seed = checks.check_seed(seed)
        shared = {"trainable": False, "aggregation": "only_first_replica"}
        self.step = self.add_weight((), "zeros", "int64", name="step", **shared)

    @property
    def num_steps(self):
        """Number of training steps made, an int."""
        return int(keras.ops.convert_to_numpy(self.step))

    def compile(self, optimizer, jit_compile=False, steps_per_execution=1, **options):
        """Set what training needs, as ``keras.Model.compile`` does.

        ``jit_compile`` is whether XLA compiles the step: on a CPU, it is faster with images and slower with few
        coordinates, and it leaves out the checks of data. A loss and metrics are built in, so they are refused, as are
        ``jit_compile`` and ``steps_per_execution`` on several devices, where Keras fails with them.
        """
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name} cannot be given: the losses that are trained and reported are built in")
        if self.distribute_strategy.num_replicas_in_sync > 1 and (jit_compile or steps_per_execution != 1):
            needed = "jit_compile must be False and steps_per_execution 1"
            raise ValueError(f"on several devices, {needed}, got {jit_compile!r} and {steps_per_execution!r}")
        self.compile_options = {**options, "jit_compile": jit_compile, "steps_per_execution": steps_per_execution}
        super().compile(optimizer=optimizer, **self.compile_options)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        **options,
    ):
        """Train as ``keras.Model.fit`` does, on data in an order that a resumed run repeats.

        ``x`` holds points (n, *event), an array of real numbers, or batches of them (batch, *event): a
        ``tf.data.Dataset``, a ``keras.utils.PyDataset`` or a generator. ``y`` is ignored. ``batch_size`` None is 32; on
        several devices, points of an array that fill no batch are left out. With ``steps_per_epoch``, data begin again
        where they end, within an epoch too. A UserWarning tells of data far from those that a network was built for.

        A run is resumed by the same call in a new process, with ``keras.callbacks.BackupAndRestore``, or on a model
        loaded from a checkpoint with ``initial_epoch``. Arrays are shuffled anew in each pass, by ``seed`` and the
        number of steps made. A ``tf.data.Dataset`` has to repeat itself: give its ``shuffle`` a seed. Other iterables
        start anew.

        Raises:
            ValueError: for data that are empty, not finite, not real numbers, of another shape, or so large that their
                rounding errors are as large as the noise (of batches, the first one is looked at); for weights; for
                callbacks that watch what is not logged; before ``compile``.
            FloatingPointError: when a loss or gradient stops being finite. The weights are then the last good ones.
        """
        if not self.compiled:
            raise ValueError(f"call compile() before fit(): this {type(self).__name__} has no optimizer yet")
        if class_weight is not None or sample_weight is not None:
            raise ValueError("class_weight and sample_weight are not supported: each point weighs the same")
        for name, value in (("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch)):
            if value is not None:
                checks.check_integer(name, value)
        batch_size = batch_size or 32
        # A list of Keras keeps its order.
        callbacks = [] if callbacks is None else getattr(callbacks, "callbacks", callbacks)
        callbacks = [*callbacks] if isinstance(callbacks, (list, tuple)) else [callbacks]
        checks.check_callbacks(callbacks, [*self.get_metrics_result()])
        position = Position(self, initial_epoch)
        if is_array(x):
            x = self.check_data("x", x, warns=True)
            if validation_split and validation_data is None:
                num_training = int(len(x) * (1 - checks.check_interval("validation_split", validation_split, 0, 1)))
                if num_training == 0:
                    raise ValueError(f"{validation_split=} leaves none of {len(x)} points to train on")
                x, validation_data, validation_split = x[:num_training], x[num_training:], 0.0
            x, position.steps_per_epoch = make_batches(self, x, batch_size, shuffle, steps_per_epoch)
            steps_per_epoch = None
        elif isinstance(x, tf.data.Dataset):
            x, steps_per_epoch = position.continue_dataset(x, steps_per_epoch)
        elif isinstance(x, keras.utils.PyDataset):
            self.check_data("x", points_of(x[0]), warns=True)
        elif isinstance(x, types.GeneratorType):
            first = next(x, None)
            self.check_data("x", points_of(first), warns=True)
            x = (batch for batch in itertools.chain([first], x))
        elif x is None or isinstance(x, (dict, str)) or not (hasattr(x, "__iter__") or hasattr(x, "__getitem__")):
            raise ValueError(f"x must be an array or batches of points, got a {type(x).__name__}")
        if isinstance(validation_data, tuple):
            validation_data = points_of(validation_data)
        if is_array(validation_data):
            validation_data = self.check_data("validation_data", validation_data)
            options.setdefault("validation_batch_size", batch_size)
        self._initial_epoch = None  # BackupAndRestore leaves that of the last run
        shuffle = shuffle and isinstance(x, keras.utils.PyDataset)
        # Our callback comes last, after those that restore. The order is that of Keras.
        rest = (validation_split, validation_data, shuffle, None, None, initial_epoch, steps_per_epoch)
        with position.naming_what_is_wrong():
            return super().fit(x, None, None, epochs, verbose, [*callbacks, position], *rest, **options)

    def evaluate(self, x=None, *arguments, **options):
        """Measure the losses, with the same noise each time; as ``keras.Model.evaluate``, see ``fit`` for the data."""
        if options.get("sample_weight") is not None:
            raise ValueError("sample_weight is not supported: each point weighs the same")
        if is_array(x):
            x = self.check_data("x", x)
        return super().evaluate(x, *arguments, **options)

    def check_data(self, name, x, warns=False):
        """Return data as an array (n, *event), or raise an error; ``warns`` if they are far from what was expected."""
        x = checks.check_points(name, x, self.event_shape, self.variable_dtype, self.noise_range[0])
        if warns:
            checks.warn_of_units(x, self.networks)
        return x

    # ------------------------------------------------------------------------------------------ one step

    def descend(self, optimizer, network, loss, name="the loss"):
        """Take one optimizer step down ``loss()`` plus the penalties of ``network``; return the loss before the step.

        Penalties are those of regularizers and of ``add_loss``; the loss returned, its mean over devices, is without
        them. Where loss or gradient is not finite, the step is not taken: an error is raised, or, compiled by XLA,
        which has no errors, the value returned is NaN.
        """
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with tf.GradientTape() as tape:
            value = loss()
            penalised = tf.add_n([value, *(tf.cast(penalty, value.dtype) for penalty in network.losses)])
            share = optimizer.scale_loss(penalised / num_replicas)  # optimizers add up the gradients of all replicas
        variables = network.trainable_variables  # read here: the loss is what builds a network without an Input
        gradients = tape.gradient(share, variables)
        known = [gradient for gradient in gradients if gradient is not None]  # of weights that the loss depends on
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            known = []  # it leaves out steps that are not finite, and lowers its scale
        if not self.jit_compile:
            finite = [(penalised, name), *((gradient, f"the gradient of {name}") for gradient in known)]
            with tf.control_dependencies([assert_finite(*each) for each in finite]):
                optimizer.apply(gradients, variables)
                return tf.identity(value)
        is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(values)) for values in (penalised, *known)])
        tf.cond(is_finite, lambda: optimizer.apply(gradients, variables), lambda: None)
        return tf.where(is_finite, value, math.nan)

    def finish_step(self):
        """Count the step, if its losses are finite, and return the means of the losses."""
        means = self.get_metrics_result()
        is_finite = tf.reduce_all([tf.math.is_finite(mean) for mean in means.values()])
        self.step.assign_add(tf.cast(is_finite, tf.int64))
        return means

    def read_batch(self, data):
        """The points of a batch, in whatever form Keras passes it on, as a tensor (batch, *event) of finite numbers."""
        return assert_finite(self.as_tensor(points_of(data)), "the batch of points")

    def as_tensor(self, x):
        """Return points as a tensor (batch, *event) of the model's type, or raise ValueError for another shape."""
        x = keras.ops.convert_to_tensor(x if tf.is_tensor(x) else checks.as_array(x), dtype=self.variable_dtype)
        expected = checks.format_shape(("batch", *(("...",) if self.event_shape is None else self.event_shape)))
        if x.shape.rank == 0 or (self.event_shape and not x.shape[1:].is_compatible_with(self.event_shape)):
            raise ValueError(f"points must have shape {expected}, got {tuple(x.shape)}")
        return x

    # ------------------------------------------------------------------------------------------ files

    def get_compile_config(self):
        if not self.compiled:
            return None
        return {"optimizer": keras.saving.serialize_keras_object(self.optimizer), **self.compile_options}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    def save(self, filepath, overwrite=True, **options):
        """Save as ``keras.Model.save`` does; a file that is there stays whole until the new one is complete."""
        if is_for_keras(filepath, overwrite):
            return super().save(filepath, overwrite=overwrite, **options)
        with replacing(filepath) as temporary:
            super().save(temporary, **options)

    def save_weights(self, filepath, overwrite=True, **options):
        """Save weights as ``keras.Model.save_weights`` does, with those of the optimizers; files are replaced whole."""
        if is_for_keras(filepath, overwrite):
            return super().save_weights(filepath, overwrite=overwrite, **options)
        with replacing(filepath) as temporary:
            if options.get("max_shard_size") is not None:
                return super().save_weights(temporary, **options)
            memory = NamedMemory(temporary)
            super().save_weights(memory, **options)
            if written := memory.getvalue():
                temporary.write_bytes(written)

    def export(self, filepath, format="tf_saved_model", **options):
        """Export what calling the model returns, as ``keras.Model.export`` does; a folder is replaced whole."""
        shape = getattr(self, "latent_shape", self.event_shape)  # of what the model is called on
        if shape is not None and options.get("input_signature") is None:  # Keras knows it only after a call
            options["input_signature"] = [keras.InputSpec(shape=(None, *shape), dtype=self.variable_dtype)]
        with replacing(filepath) as temporary:
            super().export(str(temporary), format=format, **options)

    @classmethod
    def load(cls, filepath, **options):
        """Load a model of this class as ``keras.saving.load_model`` does, or say what is wrong with the file.

        A file that is truncated, damaged, of version 1 or of another class is a ValueError.
        """
        path = Path(filepath)
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        if path.is_file():
            check_archive(path)
        try:
            model = keras.saving.load_model(path, **options)
        except ValueError as error:
            if "'step'" not in str(error):
                raise
            raise ValueError(f"{path} is of version 1 of this package, whose models had no step counter") from error
        return checks.check_instance(str(path), model, cls)


def separate_optimizers(**optimizers):
    """Give each of several networks an optimizer of its own: the one named for it, or a copy, if that is in use."""
    separate = {}
    for name, optimizer in optimizers.items():
        optimizer = keras.optimizers.get(optimizer)
        kind = type(optimizer).__name__
        if getattr(optimizer, "inner_optimizer", optimizer).use_ema:
            remedy = "an EGM averages the weights of its generator itself, by average_decay"
            raise ValueError(f"{name} must not have use_ema=True, as this {kind} has: {remedy}")
        if optimizer.built or any(optimizer is other for other in separate.values()):
            needed = f"{name} must be a new {kind}, as this one is in use and cannot be copied"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it warns of functions before it refuses them
                    copy = type(optimizer).from_config(optimizer.get_config())
            except Exception as error:
                raise ValueError(f"{needed}: {error}") from error
            if any("exclude" in name for name in vars(optimizer).keys() - vars(copy).keys()):
                raise ValueError(f"{needed}: its exclusions from weight decay would be lost")
            optimizer = copy
        separate[name] = optimizer
    return separate.values()


def assert_finite(value, name):
    """Return a tensor, which raises ``tf.errors.InvalidArgumentError`` when it is computed if it is not finite."""
    return tf.debugging.check_numerics(value, f"{name} is not finite")


def is_for_keras(filepath, overwrite=True):
    """Whether Keras has to write by itself: a file that is not local, or one that it has to ask about."""
    return "://" in str(filepath) or (not overwrite and Path(filepath).exists())
