"""What DDE and EGM share while they train and are saved, so that an interruption or bad data cost nothing.

The data come in an order that is a function of the seed and the number of steps made, as the noise does: a run that is
killed and resumed goes on as if nothing had happened. Bad data, and numbers that stop being finite, end in an error
before they reach a weight. Files are replaced as a whole or not at all.
"""

import contextlib
import io
import json
import numbers
import re
import weakref
import zipfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from egm_dde.files import replacing

# What a file of a model has to hold.
_PARTS_OF_A_FILE = {"config.json", "metadata.json", "model.weights.h5"}


class ResumableModel(keras.Model):
    """A ``keras.Model`` whose interrupted training can be resumed exactly, and whose files are never torn.

    Subclasses have ``num_steps``, the number of training steps made; ``seed``; ``event_shape``, the shape of a point,
    or None while it is not known; and ``smallest_noise_std``. ``_endpoints`` says what ``export`` serves.
    """

    def compile(self, optimizer, jit_compile=False, steps_per_execution=1, **options):
        """Set what training needs, as ``keras.Model.compile`` does.

        Args:
            optimizer: ``keras.optimizers.Optimizer``, or None where a subclass has several.
            jit_compile: whether XLA compiles the step. It is no faster for small networks and draws other random
                numbers.
            steps_per_execution: number of steps between two looks of the callbacks.
            **options: others of ``keras.Model.compile``.

        Raises:
            ValueError: for a loss or metrics, which are built in; for ``jit_compile`` or ``steps_per_execution`` on
                several devices, where Keras fails with them.
        """
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name} cannot be given: the losses that are trained and reported are built in")
        if self.distribute_strategy.num_replicas_in_sync > 1 and (jit_compile or steps_per_execution != 1):
            raise ValueError(
                "on several devices, jit_compile must be False and steps_per_execution 1, "
                f"got {jit_compile!r} and {steps_per_execution!r}"
            )
        options.update(jit_compile=jit_compile, steps_per_execution=steps_per_execution)
        super().compile(optimizer=optimizer, **options)
        self._compile_options = options  # what a file has to keep

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

        A run is resumed by the same call in a new process, with ``keras.callbacks.BackupAndRestore`` among the
        callbacks, or on a model loaded from a checkpoint with ``initial_epoch``. Arrays are shuffled anew in each pass,
        by ``seed`` and the number of steps made, and so are the batches of a ``PyDataset``. A ``tf.data.Dataset``
        is read up to the batch that comes next, so that it has to repeat itself: give its ``shuffle`` a seed. A run
        restored within an epoch completes it, but not that of a ``PyDataset`` or with a rest of steps that
        ``steps_per_execution`` leaves: those epochs start again. A Python generator starts anew, always.

        Args:
            x: points (n, *event) as an array of real numbers, or batches of them (batch, *event) from a
                ``tf.data.Dataset``, a ``keras.utils.PyDataset`` or a generator.
            y: ignored, like the second part of a batch: there are no targets.
            batch_size: number of points in a batch of an array; None is 32.
            epochs: as for ``keras.Model.fit``; so are all other arguments.
            verbose: how much is printed.
            callbacks: ``keras.callbacks.Callback`` or several.
            validation_split: share of an array, its last points, that is evaluated instead of trained on.
            validation_data: points to evaluate after each epoch.
            shuffle: whether an array or a ``PyDataset`` is shuffled.
            class_weight: not supported.
            sample_weight: not supported.
            initial_epoch: number of epochs made before.
            steps_per_epoch: number of batches in an epoch; None is one pass over the data. Data begin again where they
                end, within an epoch, too.
            **options: others of ``keras.Model.fit``.

        Returns:
            A ``keras.callbacks.History``.

        Raises:
            ValueError: for data that are empty, not finite, not real numbers, of another shape, or so large that their
                rounding errors are as large as the noise; for weights; before ``compile``.
            FloatingPointError: when a loss or gradient stops being finite. The weights are then the last good ones.
        """
        if not self.compiled:
            raise ValueError(f"call compile() before fit(): this {type(self).__name__} has no optimizer yet")
        if class_weight is not None or sample_weight is not None:
            raise ValueError("class_weight and sample_weight are not supported: each point weighs the same")
        for name, value in (("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch)):
            if value is not None:
                check_positive_integer(name, value)
        run = _Run(self, initial_epoch)
        if x is None:
            raise ValueError("fit needs data, got x=None")
        if _is_array(x):
            x = self._check_points("x", x)
            if validation_split and validation_data is None:
                x, validation_data = _split(x, validation_split)
                validation_split = 0.0
            batch_size = batch_size or 32
            run.set_epochs(_count_batches(x, batch_size), steps_per_epoch)
            x = _batches_of_array(x, batch_size, shuffle, self.seed, run)
        elif isinstance(x, tf.data.Dataset):
            self._check_batches(x.element_spec)
            run.set_epochs(_length(x, steps_per_epoch), steps_per_epoch)
            if run.is_endless:
                x = _batches_of_dataset(x, run, goes_on=self._has_trained_on(x))
        elif isinstance(x, keras.utils.PyDataset) and shuffle and x.num_batches and steps_per_epoch is None:
            run.steps_per_epoch = x.num_batches
            x, shuffle = _ShuffledBatches(x, self.seed, run), False
        elif isinstance(x, (dict, str)) or not (hasattr(x, "__iter__") or hasattr(x, "__getitem__")):
            raise ValueError(f"x must be an array or batches of points, got a {type(x).__name__}")
        if isinstance(validation_data, tuple):
            validation_data = self._unpack(validation_data)
        if _is_array(validation_data):
            validation_data = self._check_points("validation_data", validation_data)
            options.setdefault("validation_batch_size", batch_size or 32)
        callbacks = _add_callbacks(callbacks, run)
        self._initial_epoch = None  # BackupAndRestore leaves that of the last run
        with self._naming_the_step():
            return super().fit(
                x,
                batch_size=None if isinstance(x, tf.data.Dataset) else batch_size,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_split=validation_split,
                validation_data=validation_data,
                shuffle=shuffle and not isinstance(x, tf.data.Dataset),  # Keras warns that it cannot
                initial_epoch=initial_epoch,
                steps_per_epoch=run.steps_per_epoch if run.is_endless else steps_per_epoch,
                **options,
            )

    def evaluate(self, x=None, *arguments, **options):
        """Measure the losses, with the same noise each time; as ``keras.Model.evaluate``, see ``fit`` for the data."""
        if options.get("sample_weight") is not None:
            raise ValueError("sample_weight is not supported: each point weighs the same")
        if _is_array(x):
            x = self._check_points("x", x)
        return super().evaluate(x, *arguments, **options)

    def save(self, filepath, overwrite=True, zipped=None, **options):
        """Save as ``keras.Model.save`` does; a file that is there stays whole until the new one is complete."""
        if _is_for_keras(filepath, overwrite):
            super().save(filepath, overwrite=overwrite, zipped=zipped, **options)
            return
        with replacing(filepath) as temporary:
            if zipped is not False:
                super().save(temporary, zipped=zipped, **options)
                return
            archive = temporary.with_name("archive.keras")
            super().save(archive, **options)
            zipfile.ZipFile(archive).extractall(temporary)
            archive.unlink()

    def save_weights(self, filepath, overwrite=True, max_shard_size=None, **options):
        """Save weights as ``keras.Model.save_weights`` does, with those of the optimizers; files are replaced whole."""
        if _is_for_keras(filepath, overwrite):
            super().save_weights(filepath, overwrite=overwrite, max_shard_size=max_shard_size, **options)
            return
        with replacing(filepath) as temporary:
            if max_shard_size is not None:
                super().save_weights(temporary, max_shard_size=max_shard_size, **options)
                return
            memory = _Memory(temporary.name)
            super().save_weights(memory, **options)
            temporary.write_bytes(memory.getvalue())

    def export(self, filepath, format="tf_saved_model", **options):
        """Export for serving, as ``keras.Model.export`` does.

        The endpoints of a SavedModel are methods of the object that ``tf.saved_model.load(filepath)`` returns. A
        ``DDE`` has ``serve(x)``, which returns log density and score, and with a range of levels
        ``serve_level(x, noise_std)``. An ``EGM`` has ``serve(z)``, which maps latents to points,
        ``sample(n_samples, seed)``, and ``log_density_and_score(x)`` of the data. Points, latents and levels are
        tensors of the model's type, the two numbers int32 scalars.

        Args:
            filepath: folder to write.
            format: "tf_saved_model", or another one of ``keras.Model.export``.
            **options: others of ``keras.Model.export``; not with "tf_saved_model".
        """
        if format != "tf_saved_model":
            super().export(filepath, format=format, **options)
            return
        if options.keys() - {"verbose"}:
            raise ValueError(f"a SavedModel has no options but verbose, got {sorted(options)}")
        if self.event_shape is None:
            raise ValueError("the network does not know the shape of its points yet: call it on some before export")
        archive = keras.export.ExportArchive()
        archive.track(self)
        for name, (function, signature) in self._endpoints().items():
            archive.add_endpoint(name, function, input_signature=signature)
        if _is_for_keras(filepath):
            archive.write_out(filepath, **options)
            return
        with replacing(filepath) as temporary:
            archive.write_out(str(temporary), **options)

    @classmethod
    def load(cls, filepath, **options):
        """Load a model of this class from a ``.keras`` file.

        ``keras.saving.load_model`` loads it, too; this checks the file first and says what is wrong with it.

        Args:
            filepath: the file.
            **options: for ``keras.saving.load_model``.

        Returns:
            The model.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated, damaged, no ``.keras`` file, or holds a model of another class.
        """
        path = Path(filepath)
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        if path.is_file():
            _check_archive(path)
        model = keras.saving.load_model(path, **options)
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def _check_points(self, name, x):
        return check_points(name, x, self.event_shape, self.variable_dtype, self.smallest_noise_std)

    def _check_batches(self, spec):
        spec = spec[0] if isinstance(spec, tuple) else spec
        if not isinstance(spec, tf.TensorSpec):
            raise ValueError(f"a batch of x must be one tensor of points, got {spec}")
        if not (spec.dtype.is_floating or spec.dtype.is_integer):
            raise ValueError(f"x must be real numbers (floats or integers), got {spec.dtype.name}")
        event_shape = self.event_shape
        if event_shape is not None and not spec.shape[1:].is_compatible_with(event_shape):
            raise ValueError(
                f"batches of x must have shape {format_shape(('batch', *event_shape))}, got {tuple(spec.shape)}"
            )

    def _unpack(self, data):
        """The points of a batch, in whatever form Keras passes it on."""
        x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if sample_weight is not None:
            raise ValueError("sample weights are not supported: each point weighs the same")
        return x

    def _has_trained_on(self, dataset):
        last = getattr(self, "_last_dataset", lambda: None)()
        self._last_dataset = weakref.ref(dataset)
        return last is dataset

    @contextlib.contextmanager
    def _naming_the_step(self):
        try:
            yield
        except tf.errors.InvalidArgumentError as error:
            found = re.search(r"(\S[^\n]*) is not finite", error.message)
            if not found:
                raise
            raise _not_finite(found[1], self.num_steps) from error


def check_finite(value, name):
    """Return a tensor, which raises ``tf.errors.InvalidArgumentError`` when it is computed if it is not finite."""
    return tf.debugging.check_numerics(value, f"{name} is not finite")


def check_points(name, x, event_shape, dtype, smallest_noise_std):
    """Return data as an array (n, *event) of a type, or raise an error that says what is wrong with them.

    Args:
        name: what the error calls them.
        x: array of real numbers.
        event_shape: shape of a point; None in it stands for any size, None instead of it for any shape.
        dtype: "float32" or "float64".
        smallest_noise_std: what rounding errors are compared with, in data units.

    Returns:
        NumPy array (n, *event).

    Raises:
        ValueError: for data that are empty, not finite, not real numbers, of another shape or too large.
    """
    try:
        array = np.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of points: {error}") from None
    if array.dtype.name == "bfloat16":  # not a type of NumPy itself
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers (floats or integers), got {array.dtype}")
    expected = ("...",) if event_shape is None else event_shape
    shapes = zip(array.shape[1:], expected, strict=False)
    fits = event_shape is None or (
        array.ndim == 1 + len(event_shape) and all(size in (given, None) for given, size in shapes)
    )
    if array.ndim < 2 or not fits:
        raise ValueError(f"{name} must have shape {format_shape(('n', *expected))}, got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must hold at least one point, got shape {array.shape}")
    with np.errstate(over="ignore"):  # it is reported below
        points = array.astype(dtype, copy=False)
    is_finite = np.isfinite(points).reshape(len(points), -1).all(axis=1)
    if not is_finite.all():
        first = int(np.argmin(is_finite))
        raise ValueError(
            f"{name} must be finite, got NaN, infinity or numbers too large for {dtype} in {(~is_finite).sum()} of "
            f"{len(points)} points, first at index {first}: {array[first].ravel()[:4]}"
        )
    largest = np.abs(points).max()
    rounding = max(np.spacing(values.max()) for values in (largest, np.abs(array).max()) if values.dtype.kind == "f")
    if rounding > 0.1 * smallest_noise_std:
        raise ValueError(
            f"{name} are as large as {largest:g}, where numbers of this type lie {rounding:g} apart, too far for a "
            f"noise_std of {smallest_noise_std:g}: subtract the mean, or divide by the standard deviation"
        )
    return points


def check_positive_integer(name, value):
    """Raise ValueError unless a value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def format_shape(shape):
    """Write a shape such as ("batch", 2) for people."""
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


class _Memory(io.BytesIO):
    """A file in memory, where HDF5 writes first: on a full disk it would crash the process."""

    def __init__(self, name):
        super().__init__()
        self._name = name

    def __str__(self):  # Keras looks at the end of it
        return self._name


def _is_for_keras(filepath, overwrite=True):
    """Whether Keras has to write by itself: a file that is not local, or one that it has to ask about."""
    return "://" in str(filepath) or (not overwrite and Path(filepath).exists())


# ---------------------------------------------------------------------------------------------- order of the data


class _Run(keras.callbacks.Callback):
    """Knows how many steps of one ``fit`` are made, be it by this process or by one that was interrupted."""

    def __init__(self, model, initial_epoch):
        super().__init__()
        self.set_model(model)
        self.steps_per_epoch = None  # stays None where the data do not know their length
        self.is_endless = False  # whether the data of all epochs come from one iterator
        self.before_epochs = []  # functions to call once a callback may have restored the model
        self.ends_epoch = False
        self._steps_at_start = model.num_steps
        self._initial_epoch = initial_epoch
        self._steps_before = None
        self._start = None
        self._steps_left = None

    def set_epochs(self, num_batches, steps_per_epoch):
        """Take the length of an epoch: the number of batches in the data, if it is known, or what the user says."""
        self.steps_per_epoch = steps_per_epoch or num_batches
        # Several steps at once cannot end within an epoch, unless the data do.
        in_one_go = self.model.steps_per_execution
        self.is_endless = self.steps_per_epoch is not None and self.steps_per_epoch % in_one_go == 0
        if steps_per_epoch and not self.is_endless:
            raise ValueError(
                f"steps_per_epoch must be a multiple of steps_per_execution={in_one_go}, got {steps_per_epoch}"
            )

    @property
    def position(self):
        """Number of steps made since the first epoch began."""
        return self.model.num_steps - self.steps_before

    @property
    def position_at_start(self):
        """Number of steps that ``fit`` was told to have been made."""
        return self._initial_epoch * self.steps_per_epoch

    @property
    def steps_before(self):
        """Number of steps that the model had made when the first epoch began."""
        return self._steps_at_start - self.position_at_start if self._steps_before is None else self._steps_before

    def on_train_begin(self, logs=None):
        # The callback that restores has a file for the number of epochs and one for the weights. A kill may come
        # between the two, but the weights come with the number of steps.
        if self.steps_per_epoch is None:
            return
        if self.model.num_steps < self._steps_at_start:  # steps that this process made are given up
            self._steps_before = self.model.num_steps - (self.model._initial_epoch or 0) * self.steps_per_epoch
        self.model._initial_epoch = self.position // self.steps_per_epoch
        steps_made = self.position % self.steps_per_epoch
        if steps_made and self.is_endless:
            self._steps_left = self.steps_per_epoch - steps_made
        for function in self.before_epochs:
            function()

    def on_epoch_begin(self, epoch, logs=None):
        # Not read while the data are: by then, the step that asks for them may have counted itself.
        if self.steps_per_epoch is not None:
            self._start = self.steps_before, self.position

    def on_train_batch_end(self, batch, logs=None):
        if self.model.jit_compile and not self.model.stop_training:  # XLA leaves out the checks within a step
            for name, value in logs.items():
                if not np.isfinite(value):
                    raise _not_finite(name, self.model.num_steps)
        if self._steps_left is not None and batch + 1 >= self._steps_left and not self.model.stop_training:
            self.ends_epoch = self.model.stop_training = True  # ends this epoch, and _NextEpoch sees to the others

    def on_epoch_end(self, epoch, logs=None):
        self._steps_left = None

    def from_position(self, make_batches):
        """Return a ``tf.data.Dataset`` that finds out where to start only when it is iterated.

        Args:
            make_batches: function of two integer tensors, ``steps_before`` and ``position``, to a dataset.
        """
        scalar = tf.TensorSpec([], tf.int64)
        start = tf.data.Dataset.from_generator(
            lambda: [self._start or (self.steps_before, self.position)], output_signature=(scalar, scalar)
        )
        return start.flat_map(make_batches)


class _NextEpoch(keras.callbacks.Callback):
    """Lets training go on after an epoch that a run resumed within it has completed; it comes before all others."""

    def __init__(self, run):
        super().__init__()
        self._run = run

    def on_epoch_end(self, epoch, logs=None):
        if self._run.ends_epoch:
            self._run.ends_epoch = self.model.stop_training = False


def _batches_of_array(x, batch_size, shuffle, seed, run):
    """Return an endless ``tf.data.Dataset`` of batches (batch, *event) of an array."""
    num_batches = _count_batches(x, batch_size)
    with tf.device("CPU"):
        x = tf.constant(x)

    def make_pass(steps_before):
        order = tf.range(len(x))
        if shuffle:
            order = tf.random.experimental.stateless_shuffle(order, tf.stack([seed, steps_before]))
        starts = tf.data.Dataset.range(0, len(x), batch_size)
        return starts.map(lambda start: tf.gather(x, order[start : start + batch_size]))

    def make_batches(steps_before, position):
        passes = tf.data.Dataset.counter(steps_before + position // num_batches * num_batches, num_batches)
        return passes.flat_map(make_pass).skip(position % num_batches)

    batches = run.from_position(make_batches)
    if not run.is_endless:
        batches = batches.take(num_batches).apply(tf.data.experimental.assert_cardinality(num_batches))
    return batches.prefetch(tf.data.AUTOTUNE)


def _batches_of_dataset(dataset, run, goes_on):
    """Return a ``tf.data.Dataset`` that repeats another one, from the batch on that comes next."""
    skipped_at_start = run.position_at_start if goes_on else 0  # its own shuffling went on as well
    return run.from_position(
        lambda steps_before, position: dataset.repeat().skip(position - skipped_at_start)
    ).with_options(dataset.options())


class _ShuffledBatches(keras.utils.PyDataset):
    """The batches of a ``PyDataset``, shuffled anew in each epoch."""

    def __init__(self, batches, seed, run):
        super().__init__(batches.workers, batches.use_multiprocessing, batches.max_queue_size)
        self._batches, self._seed, self._model = batches, seed, run.model
        self._shuffle()
        run.before_epochs.append(self._shuffle)

    @property
    def num_batches(self):
        return self._batches.num_batches

    def __getitem__(self, index):
        return self._batches[int(self._order[index])]

    def on_epoch_begin(self):
        self._batches.on_epoch_begin()

    def on_epoch_end(self):
        self._batches.on_epoch_end()
        self._shuffle()  # not when the epoch begins: by then, workers may be fetching

    def _shuffle(self):
        self._order = np.random.default_rng((self._seed, self._model.num_steps)).permutation(self.num_batches)


def _is_array(x):
    return hasattr(x, "__array__") or isinstance(x, (list, tuple, numbers.Number))


def _split(x, validation_split):
    if not 0 < validation_split < 1:
        raise ValueError(f"validation_split must be at least 0 and less than 1, got {validation_split!r}")
    num_training = int(len(x) * (1 - validation_split))
    if num_training == 0:
        raise ValueError(f"validation_split={validation_split!r} leaves none of {len(x)} points to train on")
    return x[:num_training], x[num_training:]


def _count_batches(x, batch_size):
    return -(-len(x) // batch_size)


def _length(dataset, steps_per_epoch):
    """Return the number of batches of a ``tf.data.Dataset``, None if it is not known."""
    length = int(dataset.cardinality())
    if length == 0:
        raise ValueError("x must hold at least one batch, got an empty tf.data.Dataset")
    if length == tf.data.INFINITE_CARDINALITY and steps_per_epoch is None:
        raise ValueError("x is an endless tf.data.Dataset: say how many steps_per_epoch to take from it")
    return length if length > 0 else None


def _add_callbacks(callbacks, run):
    """Add ours to the callbacks of the user, and mend the files of those that restore."""
    callbacks = [] if callbacks is None else getattr(callbacks, "callbacks", callbacks)  # of a CallbackList
    callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            path = Path(callback.backup_dir) / "training_metadata.json"
            with contextlib.suppress(OSError):
                if not _is_json(path.read_text()):  # killed while it was written; the weights know the epoch, too
                    path.unlink()
    return [_NextEpoch(run), *callbacks, run]


def _is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _not_finite(name, num_steps):
    return FloatingPointError(
        f"{name} is not finite: training has stopped at step {num_steps + 1}, and the weights are those before it. "
        "Common causes are a learning rate that is too high, and data that are not finite or far from all others."
    )


def _check_archive(path):
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            missing = _PARTS_OF_A_FILE - set(archive.namelist())
    except Exception as error:  # damage can raise errors of any type
        raise ValueError(f"{path} is truncated, damaged or no .keras file: {error}") from error
    if damaged or missing:
        what = f"{damaged} in it is damaged" if damaged else f"it has no {' and '.join(sorted(missing))}"
        raise ValueError(f"{path} is no whole .keras file: {what}")
