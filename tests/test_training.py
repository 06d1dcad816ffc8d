"""Interruptions, the order of the data, files and networks of one's own."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.callbacks import BackupAndRestore, Callback, ModelCheckpoint
from keras.optimizers import SGD, Adam, RMSprop
from keras.optimizers.schedules import CosineDecay
from small_models import (
    assert_equal_arrays,
    assert_equal_states,
    compiled,
    ddes_of,
    dense_net,
    differ,
    make_dde,
    make_egm,
    normal,
    state,
    trained_parts,
    values_of,
)

from egm_dde.batches import Position, make_batches
from egm_dde.visualization import write_gif
from energy_models import DDE, EGM

KINDS = ["DDE", "EGM"]
NUM_POINTS, BATCH_SIZE, EPOCHS = 22, 4, 4  # the last of the 6 batches of an epoch is smaller
X = normal(NUM_POINTS, 3)


def make_model(kind, seed=3, **options):
    model = make_egm("range", dde_steps=1, seed=seed) if kind == "EGM" else make_dde("range", seed=seed)
    accumulation = 4 if kind == "accumulating DDE" else None
    return compiled(model, lambda: Adam(0.01, gradient_accumulation_steps=accumulation), **options)


class Batches(keras.utils.PyDataset):
    """Slices of points."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return -(-len(self.x) // BATCH_SIZE)

    def __getitem__(self, index):
        return (self.x[index * BATCH_SIZE :][:BATCH_SIZE],)


class Interrupt(Callback):
    """Ends training as Ctrl-C does, after a number of batches."""

    def __init__(self, num_batches):
        super().__init__()
        self.num_batches = num_batches

    def on_train_batch_end(self, batch, logs=None):
        self.num_batches -= 1
        if self.num_batches < 0:
            raise KeyboardInterrupt


def slowly(*cases):
    """Mark cases of a test as slow."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def shuffled_dataset():
    return tf.data.Dataset.from_tensor_slices(X).shuffle(NUM_POINTS, seed=5)


DATA = {
    "array": lambda: (X, {"batch_size": BATCH_SIZE}),
    "array in order": lambda: (X, {"batch_size": BATCH_SIZE, "shuffle": False}),
    "array in parts": lambda: (X, {"batch_size": BATCH_SIZE, "steps_per_epoch": 4}),
    "dataset": lambda: (shuffled_dataset().batch(BATCH_SIZE), {}),
    "endless dataset": lambda: (shuffled_dataset().repeat().batch(BATCH_SIZE), {"steps_per_epoch": 5}),
    "PyDataset in order": lambda: (Batches(X), {"shuffle": False}),
}


def fit(model, data_kind, *callbacks, epochs=EPOCHS, **options):
    data, data_options = DATA[data_kind]()
    return model.fit(data, epochs=epochs, verbose=0, callbacks=[*callbacks], **data_options, **options)


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def uninterrupted():
    """Models and histories of runs that nothing interrupts, by kind of model and data."""
    runs = {}

    def run(kind, data_kind):
        if (kind, data_kind) not in runs:
            model = make_model(kind)
            runs[kind, data_kind] = model, fit(model, data_kind).history
        return runs[kind, data_kind]

    return run


def assert_ends_like(expected, model, history, first_epoch):
    """The run began at an epoch and ended with the losses and the state of the one expected."""
    expected_model, expected_history = expected
    assert history.epoch == list(range(first_epoch, EPOCHS))
    for name, values in history.history.items():
        assert values == expected_history[name][first_epoch:]
    assert_equal_states(expected_model, model)


CASES = [*(("DDE", data_kind) for data_kind in DATA), ("EGM", "array"), ("accumulating DDE", "array")]


@pytest.mark.parametrize(("kind", "data_kind"), [CASES[0], *slowly(*CASES[1:-1]), CASES[-1]])
def test_restored_training_goes_on_as_if_nothing_had_happened(kind, data_kind, uninterrupted, tmp_path):
    for num_batches in (9, 5):  # each time in the middle of an epoch, after another one
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(kind), data_kind, BackupAndRestore(tmp_path / "backup"), Interrupt(num_batches))
    model = make_model(kind)
    history = fit(model, data_kind, BackupAndRestore(tmp_path / "backup"))
    first_epoch = 3 if data_kind == "array in parts" else 2 if data_kind == "endless dataset" else 1
    assert_ends_like(uninterrupted(kind, data_kind), model, history, first_epoch)


@pytest.mark.parametrize(
    "data_kind", ["array in parts", *slowly("array", "dataset", "endless dataset", "PyDataset in order")]
)
def test_training_goes_on_from_a_checkpoint(data_kind, uninterrupted, tmp_path):
    fit(make_model("DDE"), data_kind, ModelCheckpoint(tmp_path / "{epoch}.keras"), epochs=2)
    loaded = keras.saving.load_model(tmp_path / "2.keras")
    history = fit(loaded, data_kind, initial_epoch=2)
    assert_ends_like(uninterrupted("DDE", data_kind), loaded, history, 2)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [None, 1])
def test_a_backup_whose_two_files_disagree_goes_by_its_weights(epoch, uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(make_model("DDE"), "array", BackupAndRestore(tmp_path), Interrupt(14))
    metadata = tmp_path / "training_metadata.json"
    if epoch is None:
        metadata.unlink()
    else:
        metadata.write_text(json.dumps({"epoch": epoch, "batch": 0}))
    model = make_model("DDE")
    history = fit(model, "array", BackupAndRestore(tmp_path))
    assert_ends_like(uninterrupted("DDE", "array"), model, history, 2)


def test_training_again_in_one_process_starts_at_the_first_epoch(tmp_path):
    model = make_model("DDE")
    with pytest.raises(KeyboardInterrupt):
        fit(model, "array", BackupAndRestore(tmp_path / "backup"), Interrupt(8), epochs=2)
    fit(model, "array", BackupAndRestore(tmp_path / "backup"), epochs=2)
    assert fit(model, "array", epochs=2).epoch == [0, 1]
    for first_epoch in (1, 0, 3):  # each begins where it is told to, whatever the one before was told
        assert fit(model, "array", initial_epoch=first_epoch).epoch == [*range(first_epoch, EPOCHS)]
    assert model.fit((batch for batch in [(X[:4],)]), verbose=0).epoch == [0]  # nobody knows its length


class KillWhileSaving(Callback):
    """Kills the process when it has written half of its second backup."""

    def on_epoch_end(self, epoch, logs=None):
        def write_half(path, data):
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        if epoch > 0:
            Path.write_bytes = write_half


def train_until_killed(folder):
    fit(make_model("EGM"), "array", KillWhileSaving(), BackupAndRestore(folder))


@pytest.mark.slow
def test_training_killed_while_it_saves_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path):
    program = "import sys, test_training; test_training.train_until_killed(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    process = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, timeout=300)
    assert process.returncode == -signal.SIGKILL
    model = make_model("EGM")
    assert_ends_like(uninterrupted("EGM", "array"), model, fit(model, "array", BackupAndRestore(tmp_path)), 1)


@pytest.mark.parametrize("kind", ["DDE", *slowly("EGM")])
def test_a_loop_written_by_hand_repeats_itself_and_fit(kind, tmp_path):
    fitted, by_hand, restored = (make_model(kind) for _ in range(3))
    x = normal(20, 3)  # batches of one size: graphs for others may round otherwise, and so may that of fit
    fitted.fit(x, batch_size=4, shuffle=False, epochs=2, verbose=0)
    for step in range(10):
        if step == 5:
            restored.save_weights(tmp_path / "model.weights.h5")
            restored = make_model(kind)
            restored.load_weights(tmp_path / "model.weights.h5")
        batch = x[step % 5 * 4 :][:4]
        by_hand.train_on_batch(batch)
        restored.train_on_batch(batch)
    assert_equal_states(by_hand, restored)
    for one, other in zip(state(by_hand), state(fitted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the order of arrays


def four_passes(data_kind, epochs, seed=3):
    """Give the first coordinates of the points in four passes, made by calling fit twice."""
    model, batches = make_model("DDE", seed=seed, run_eagerly=True), []

    def recording(x, *arguments, **options):
        batches.append(x.numpy()[:, 0])
        return tf.add_n([tf.reduce_sum(variable) for variable in model.trainable_variables])  # quick, and of no matter

    model.denoising_loss = recording
    for _ in range(2):
        fit(model, data_kind, epochs=epochs)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2] * 4
    return np.split(np.concatenate(batches), 4)


def test_each_point_is_seen_once_in_a_pass_and_each_pass_has_an_order_of_its_own():
    orders = []
    for data_kind, epochs, seed in (("array", 2, 3), ("array", 2, 3), ("array in parts", 3, 3), ("array", 2, 4)):
        keras.utils.set_random_seed(len(orders))  # global seeds must not matter
        orders.append(four_passes(data_kind, epochs, seed))
        for one in orders[-1]:
            np.testing.assert_array_equal(np.sort(one), np.sort(X[:, 0]))
        assert len({tuple(one) for one in orders[-1]}) == 4
    first, again, in_parts, other_seed = orders
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, in_parts)  # an epoch of any length begins where the last one stopped
    assert differ(first, other_seed)


@pytest.mark.parametrize("kind", ["DDE", *slowly("EGM")])
def test_training_is_a_function_of_the_seed_and_the_batches(kind):
    x, results = X[:10], []
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(BATCH_SIZE)
    for data in (x, x.astype(np.float64), tf.constant(x), dataset, Batches(x), x):
        model = make_model(kind, seed=3 if len(results) < 5 else 4, run_eagerly=True)
        history = model.fit(data, batch_size=BATCH_SIZE, epochs=2, shuffle=False, verbose=0).history
        results.append([*history.values(), *model.get_weights()])
    *results, other_seed = results
    for result in results:
        assert_equal_arrays(results[0], result)
    assert differ(results[0], other_seed)
    evaluations = [model.evaluate(data, verbose=0) for data in (dataset, Batches(x))]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_data_are_tuned_only_where_that_is_asked_for(is_asked_for):
    # The end of fit would wait for TensorFlow's tuning thread, which sleeps for up to a minute.
    options = tf.data.Options()
    if is_asked_for:
        options.autotune.enabled = True
    model, x = make_model("DDE"), normal(4, 3)
    dataset = tf.data.Dataset.from_tensors(x).with_options(options)
    for batches, expected in (
        (Position(model, 0).continue_dataset(dataset, 1)[0], is_asked_for),
        (make_batches(model, x, 2, True, None)[0], False),
    ):
        assert batches.options().autotune.enabled is expected


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def full_disk(num_bytes):
    """Let no file grow beyond a size: writing fails in the system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(path):
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    return path.read_bytes()


WRITERS = {
    "model.keras": lambda model, path: model.save(path),
    "folder": lambda model, path: model.save(path, zipped=False),
    "model.weights.h5": lambda model, path: model.save_weights(path),
    "exported": lambda model, path: model.export(path, verbose=False),
    "picture.gif": lambda model, path: write_gif(path, np.random.default_rng(0).integers(0, 256, (3, 99, 99, 3), "u1")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name, tmp_path):
    if name == "model.weights.h5" and tuple(map(int, keras.version().split(".")[:2])) < (3, 10):
        pytest.skip("this Keras writes weights to a file itself, and HDF5 crashes on a full disk")
    model, path = make_model("EGM"), tmp_path / name
    WRITERS[name](model, path)
    before = contents(path)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    for num_bytes in (0, 3000):
        with full_disk(num_bytes), pytest.raises((OSError, RuntimeError, tf.errors.OpError)):
            WRITERS[name](model, path)
    assert contents(path) == before
    WRITERS[name](model, path)
    assert (contents(path) != before) == (name != "picture.gif")
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write model\.keras to"):
        make_model("DDE").save(tmp_path / "nowhere" / "model.keras")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.keras"):
        EGM.load(tmp_path / "nothing.keras")


@keras.saving.register_keras_serializable("tests")
class OwnGenerator(keras.Model):
    """A generator written as a class."""

    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.hidden, self.out = keras.layers.Dense(width, "tanh"), keras.layers.Dense(3)

    def call(self, z):
        return self.out(self.hidden(z))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable("tests")
class OwnEnergyNet(OwnGenerator):
    """An energy network written as a class: an autoencoder's squared error, negated."""

    def call(self, inputs):
        x, *level = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        error = x - super().call(keras.ops.concatenate([x, *level], axis=-1))
        return -keras.ops.sum(keras.ops.square(error), axis=-1, keepdims=True)


def own_classes(kind):
    """An EGM whose networks are classes of one's own."""
    point, level = np.zeros((1, 3)), np.zeros((1, 1))
    real, fake, generator = OwnEnergyNet(), OwnEnergyNet(width=4), OwnGenerator()
    generator(point)
    for net in (real, fake):
        net([point, level] if kind == "range" else point)
    return make_egm(kind, dde_real=make_dde(kind, real), dde_fake=make_dde(kind, fake), generator=generator)


def trained_ddes():
    """An EGM that was never compiled, of DDEs that were trained before."""
    egm = make_egm()
    for dde in ddes_of(egm):
        compiled(dde, lambda: Adam(0.01), run_eagerly=True).fit(X, verbose=0)
    return egm


def frozen_dde():
    """An EGM of Sequential networks, one of which is not trained."""
    ddes = [make_dde(net=dense_net(1, seed=seed)) for seed in (0, 1)]
    ddes[0].trainable = False
    egm = make_egm(dde_real=ddes[0], dde_fake=ddes[1], generator=dense_net(3))
    return compiled(egm, lambda: Adam(0.01), run_eagerly=True)


def cosine_adam():
    return Adam(CosineDecay(0.01, 50), beta_1=0.3)


def three_optimizers():
    """A compiled EGM with options that nobody would make defaults."""
    options = {"dde_steps": 3, "real_steps": 2, "latents_per_point": 4, "average_decay": 0.123, "level_power": 1.7}
    egm = make_egm("range", seed=5, **options)
    egm.compile(RMSprop(0.004, momentum=0.5), cosine_adam(), SGD(0.02, momentum=0.4), steps_per_execution=2)
    return egm


def no_input():
    net = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(1, use_bias=False)])
    return compiled(make_dde(net=net), lambda: Adam(0.01), run_eagerly=True)


OPTIONS = (
    "noise_std noise_range dual_weight dde_steps real_steps latents_per_point average_decay level_power seed "
    "sources_per_point trainable compiled jit_compile steps_per_execution"
).split()
SAVED = {
    "one optimizer": lambda: compiled(make_dde(dual_weight=0.37), cosine_adam, steps_per_execution=2),
    "three optimizers": three_optimizers,
    "never compiled": lambda: make_dde("range", dual_weight=0.37, seed=12345),
    "trained DDEs": trained_ddes,
    "frozen DDE": frozen_dde,
    "no Input": no_input,
    "own classes": lambda: compiled(own_classes("fixed"), lambda: Adam(0.01)),
    "own classes, range": lambda: compiled(own_classes("range"), lambda: Adam(0.01)),
}


def answers(model):
    """Samples of a model, and the log densities and scores of its DDEs."""
    samples = [model.sample(5, seed=0)] if isinstance(model, EGM) else []
    return [*samples, *(part for dde in ddes_of(model) for part in dde(X))]


@pytest.mark.parametrize("kind", [*list(SAVED)[:-2], *slowly(*list(SAVED)[-2:])])
def test_a_loaded_model_is_the_saved_one_and_goes_on_like_it(kind, tmp_path):
    model, path, options = SAVED[kind](), tmp_path / "model.keras", {"batch_size": 4, "shuffle": False, "verbose": 0}
    if model.compiled:
        model.fit(X[:10], **options)
    model.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = keras.saving.load_model(path)
    for saved_part, loaded_part in zip(trained_parts(model), trained_parts(loaded), strict=True):
        assert type(saved_part) is type(loaded_part)
        for name in OPTIONS:
            assert getattr(saved_part, name, None) == getattr(loaded_part, name, None), name
        if saved_part.compiled:
            assert type(saved_part.optimizer) is type(loaded_part.optimizer)
            assert saved_part.optimizer.get_config() == loaded_part.optimizer.get_config()
    assert_equal_states(model, loaded)
    assert_equal_arrays(answers(model), answers(loaded))
    if model.compiled:
        before = values_of(model.trainable_weights)
        histories = [each.fit(X[:10], **options).history for each in (model, loaded)]
        assert histories[0] == histories[1]
        assert_equal_states(model, loaded)
        assert all(np.any(old != new) for old, new in zip(before, values_of(model.trainable_weights), strict=True))


def test_compile_options_reach_all_models_and_the_file(tmp_path):
    egm = make_egm()
    egm.compile(jit_compile=True, steps_per_execution=2)
    egm.save(tmp_path / "model.keras")
    for model in (egm, EGM.load(tmp_path / "model.keras")):
        assert model.steps_per_execution == 2
        assert all(part.jit_compile for part in trained_parts(model))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_serves_what_calling_it_returns(kind, tmp_path):
    model = make_model(kind)
    model.export(tmp_path / "exported", verbose=False)  # it was never called
    loaded = tf.saved_model.load(tmp_path / "exported")  # owns the variables that serving reads
    for num_points in (1, 5):
        x = normal(num_points, 3 if kind == "DDE" else 2)
        for expected, given in zip(tf.nest.flatten(model(x)), tf.nest.flatten(loaded.serve(x)), strict=True):
            np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_export_takes_the_options_of_keras(tmp_path):
    own_classes("range").dde_real.export(tmp_path / "dde", verbose=False, input_signature=[tf.TensorSpec((2, 3))])
    loaded = tf.saved_model.load(tmp_path / "dde")
    assert [tuple(part.shape) for part in loaded.serve(X[:2])] == [(2, 1), (2, 3)]
    with pytest.raises(ValueError, match="not yet been built"):
        DDE(OwnEnergyNet(), 0.3).export(tmp_path / "unknown")


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"no model at all",
    "head": lambda content: content[: len(content) // 2],
    "half": lambda content: content[len(content) // 2 :],
    "tail": lambda content: content[:-5],
    "bit": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage, tmp_path):
    path = tmp_path / "a.keras"
    make_dde().save(path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.keras is (truncated|no whole)"):
        DDE.load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "?")
    with pytest.raises(ValueError, match=r"it has no config\.json and metadata\.json and model\.weights\.h5"):
        DDE.load(path)
    dense_net(1).save(path)
    with pytest.raises(ValueError, match="must be a DDE, got a Sequential"):
        DDE.load(path)
