"""Interruptions, the order of the data, files and networks of one's own."""

import contextlib
import io
import json
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import resumable_run
import tensorflow as tf
from keras.callbacks import BackupAndRestore, Callback, ModelCheckpoint
from keras.optimizers import SGD, Adam
from small_models import assert_equal_arrays, normal

from egm_dde.batches import Position, make_batches
from egm_dde.visualization import write_gif
from energy_models import DDE, EGM, build_energy_net, build_generator

KINDS = ["DDE", "EGM"]
NUM_POINTS, BATCH_SIZE, EPOCHS = 22, 4, 4  # the last of the 6 batches of an epoch is smaller


def make_model(kind, noise_std=(0.2, 1.5), seed=3, accumulation=None, **options):
    """Make a small compiled model."""

    def make_dde(net_seed):
        net = build_energy_net(2, isinstance(noise_std, tuple), (6,), num_features=4, seed=net_seed)
        return DDE(net, noise_std, seed=seed)

    if kind == "DDE":
        model = make_dde(1)
    else:
        generator = build_generator(widths=(6,), num_features=4, seed=3)
        model = EGM(make_dde(1), make_dde(2), generator, dde_steps=1, seed=seed)
    optimizer = Adam(0.01, gradient_accumulation_steps=accumulation)
    model.compile(*[optimizer] * (1 if kind == "DDE" else 2), **options)
    return model


def state(model):
    """All that a training step changes: weights of networks and of optimizers."""
    models = [model] if isinstance(model, DDE) else [model, model.dde_real, model.dde_fake]
    variables = [*model.weights, *(variable for each in models for variable in each.optimizer.variables)]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def assert_equal_states(one, *others):
    for other in others:
        assert len(state(one)) == len(state(other))
        assert_equal_arrays(state(one), state(other))


class Batches(keras.utils.PyDataset):
    """Slices of the points."""

    def __len__(self):
        return -(-NUM_POINTS // BATCH_SIZE)

    def __getitem__(self, index):
        return (normal(NUM_POINTS, 2)[index * BATCH_SIZE : (index + 1) * BATCH_SIZE],)


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
    return tf.data.Dataset.from_tensor_slices(normal(NUM_POINTS, 2)).shuffle(NUM_POINTS, seed=5)


DATA = {
    "array": lambda: (normal(NUM_POINTS, 2), {"batch_size": BATCH_SIZE}),
    "array in order": lambda: (normal(NUM_POINTS, 2), {"batch_size": BATCH_SIZE, "shuffle": False}),
    "array in parts": lambda: (normal(NUM_POINTS, 2), {"batch_size": BATCH_SIZE, "steps_per_epoch": 4}),
    "dataset": lambda: (shuffled_dataset().batch(BATCH_SIZE), {}),
    "endless dataset": lambda: (shuffled_dataset().repeat().batch(BATCH_SIZE), {"steps_per_epoch": 5}),
    "PyDataset in order": lambda: (Batches(), {"shuffle": False}),
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


CASES = [*(("DDE", data_kind) for data_kind in DATA), ("EGM", "array")]


@pytest.mark.parametrize(("kind", "data_kind"), [CASES[0], *slowly(*CASES[1:])])
def test_restored_training_goes_on_as_if_nothing_had_happened(kind, data_kind, uninterrupted, tmp_path):
    for num_batches in (9, 5):  # each time in the middle of an epoch, after another one
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(kind), data_kind, BackupAndRestore(tmp_path / "backup"), Interrupt(num_batches))
    model = make_model(kind)
    history = fit(model, data_kind, BackupAndRestore(tmp_path / "backup"))
    first_epoch = 3 if data_kind == "array in parts" else 2 if data_kind == "endless dataset" else 1
    assert_ends_like(uninterrupted(kind, data_kind), model, history, first_epoch)


def test_restored_training_goes_on_with_the_gradients_that_it_had_accumulated(tmp_path):
    expected = make_model("DDE", accumulation=4)
    history = fit(expected, "array")
    for num_batches in (9, 5):  # four batches a step, and six an epoch
        with pytest.raises(KeyboardInterrupt):
            fit(make_model("DDE", accumulation=4), "array", BackupAndRestore(tmp_path), Interrupt(num_batches))
    model = make_model("DDE", accumulation=4)
    assert_ends_like((expected, history.history), model, fit(model, "array", BackupAndRestore(tmp_path)), 1)


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
    for first_epoch in (1, 3, 0):  # each begins where it is told to, whatever the one before was told
        assert fit(model, "array", initial_epoch=first_epoch).epoch == [*range(first_epoch, EPOCHS)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["within an epoch", "while saving"])
def test_killed_training_goes_on_as_if_nothing_had_happened(how, tmp_path):
    program = Path(__file__).with_name("resumable_run.py")
    for each in (how, "not"):
        process = subprocess.run([sys.executable, program, tmp_path, each], capture_output=True, timeout=300)
        assert process.returncode == (0 if each == "not" else -signal.SIGKILL), process.stderr.decode()
    result = np.load(tmp_path / "result.npz")
    history, expected_state = resumable_run.train()
    assert result["epochs"].tolist() == [*range(1, resumable_run.EPOCHS)]
    for name, values in history.history.items():
        assert result[name].tolist() == values[1:]
    assert_equal_arrays([result[f"arr_{index}"] for index in range(len(expected_state))], expected_state)


@pytest.mark.parametrize("kind", ["DDE", *slowly("EGM")])
def test_a_loop_written_by_hand_repeats_itself_and_fit(kind, tmp_path):
    fitted, by_hand, loaded = (make_model(kind) for _ in range(3))
    x = normal(20, 2)  # batches of one size: graphs for others may round otherwise, and so may that of fit
    fitted.fit(x, batch_size=4, shuffle=False, epochs=2, verbose=0)
    for step in range(10):
        if step == 5:
            loaded.save(tmp_path / "model.keras")
            loaded = keras.saving.load_model(tmp_path / "model.keras")
        batch = x[step % 5 * 4 :][:4]
        by_hand.train_on_batch(batch)
        loaded.train_on_batch(batch)
    assert_equal_states(by_hand, loaded)
    for one, other in zip(state(by_hand), state(fitted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the order of arrays


def record_batches(model):
    """Keep the first coordinates of the points of each training step; the model has to run eagerly."""
    batches = []

    def recording(x, *arguments, **options):
        batches.append(x.numpy()[:, 0])
        return tf.add_n([tf.reduce_sum(variable) for variable in model.trainable_variables])  # quick, and of no matter

    model.denoising_loss = recording
    return batches


def test_each_point_is_seen_once_in_a_pass_and_each_pass_has_an_order_of_its_own():
    orders = {}
    for name, seed in (("first", 3), ("again", 3), ("other seed", 4)):
        keras.utils.set_random_seed(len(orders))  # global seeds must not matter
        model = make_model("DDE", seed=seed, run_eagerly=True)
        batches = record_batches(model)
        for _ in range(2):  # fit may be called again and again
            fit(model, "array", epochs=2)
        assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2] * 4
        passes = np.split(np.concatenate(batches), 4)
        for one in passes:
            np.testing.assert_array_equal(np.sort(one), np.sort(normal(NUM_POINTS, 2)[:, 0]))
        assert len({tuple(one) for one in passes}) == 4
        orders[name] = np.concatenate(passes)
    np.testing.assert_array_equal(orders["first"], orders["again"])
    assert (orders["first"] != orders["other seed"]).any()


def test_epochs_of_any_length_go_through_the_data_again_and_again():
    model = make_model("DDE", run_eagerly=True)
    batches = record_batches(model)
    fit(model, "array in parts", epochs=3)  # 6 batches a pass, 4 steps an epoch
    first, second = np.split(np.concatenate(batches), 2)
    assert sorted(first) == sorted(second) == sorted(normal(NUM_POINTS, 2)[:, 0])


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_data_are_tuned_only_where_that_is_asked_for(is_asked_for):
    # The end of fit would wait for TensorFlow's tuning thread, which sleeps for up to a minute.
    options = tf.data.Options()
    if is_asked_for:
        options.autotune.enabled = True
    model, x = make_model("DDE"), normal(4, 2)
    dataset = tf.data.Dataset.from_tensors(x).with_options(options)
    for batches, expected in (
        (Position(model, 0).continue_dataset(dataset, 1)[0], is_asked_for),
        (make_batches(model, x, 2, True, None)[0], False),
    ):
        assert batches.options().autotune.enabled is expected


# Less than a batch, and more than are put in order in one go.
@pytest.mark.parametrize("num_points", [1, *slowly(256), 258])
def test_arrays_without_shuffle_stay_in_order(num_points):
    model = make_model("DDE", run_eagerly=True)
    batches = record_batches(model)
    x = normal(num_points, 2)
    model.fit(x, batch_size=2, shuffle=False, verbose=0)
    np.testing.assert_array_equal(np.concatenate(batches), x[:, 0])


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
    assert [each.name for each in tmp_path.iterdir()] == [name]
    WRITERS[name](model, path)
    assert (contents(path) != before) == (name != "picture.gif")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write model\.keras to"):
        make_model("DDE").save(tmp_path / "nowhere" / "model.keras")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.keras"):
        EGM.load(tmp_path / "nothing.keras")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_goes_on_like_the_saved_one(kind, tmp_path):
    model, restored = make_model(kind), make_model(kind)
    fit(model, "array", epochs=1)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = type(model).load(tmp_path / "model.keras")
    restored.load_weights(tmp_path / "model.weights.h5")
    assert_equal_states(model, loaded, restored)
    for each in (model, loaded, restored):
        fit(each, "array", initial_epoch=1, epochs=2)
    assert_equal_states(model, loaded, restored)


@keras.saving.register_keras_serializable("tests")
class OwnEnergyNet(keras.Model):
    """A network written as a class: an autoencoder's squared error, negated."""

    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.hidden = keras.layers.Dense(width, "tanh")
        self.out = keras.layers.Dense(2)

    def call(self, inputs):
        x, log_noise_std = inputs if isinstance(inputs, (list, tuple)) else (inputs, None)
        given = x if log_noise_std is None else keras.ops.concatenate([x, log_noise_std], axis=-1)
        return -keras.ops.sum(keras.ops.square(x - self.out(self.hidden(given))), axis=-1, keepdims=True)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable("tests")
class OwnGenerator(keras.Model):
    """A generator written as a class."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(5, "relu")
        self.out = keras.layers.Dense(2)

    def call(self, z):
        return self.out(self.hidden(z))


def sequential(*layers):
    return keras.Sequential([keras.Input((2,)), *layers])


def own_networks(kind, in_range):
    """Two energy networks and a generator of a kind of their own."""
    if kind == "sequential":
        nets = [sequential(keras.layers.Dense(5, "silu"), keras.layers.Dense(1, use_bias=False)) for _ in range(2)]
        return *nets, sequential(keras.layers.Dense(5, "relu"), keras.layers.Dense(2))
    if kind == "functional":
        return build_energy_net(2, in_range, (5,)), build_energy_net(2, in_range, (5,), seed=1), build_generator()
    nets, generator = [OwnEnergyNet(), OwnEnergyNet(width=4)], OwnGenerator()
    for net in nets:
        net([np.zeros((1, 2)), np.zeros((1, 1))] if in_range else np.zeros((1, 2)))
    generator(np.zeros((1, 3)))
    return *nets, generator


@pytest.mark.parametrize("in_range", [False, True], ids=["one level", "range"])
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequential", "functional", "subclass"])
def test_own_networks_train_and_are_saved(kind, in_range, tmp_path):
    if kind == "sequential" and in_range:
        pytest.skip("a Sequential network has one input")
    noise_std = (0.2, 1.5) if in_range else 0.3
    real, fake, generator = own_networks(kind, in_range)
    egm = EGM(DDE(real, noise_std, seed=1), DDE(fake, noise_std, seed=2), generator, dde_steps=1, seed=3)
    egm.compile(Adam(0.01), SGD(0.01))
    trained = [egm.dde_real, egm.dde_fake, egm.generator]
    before = [[weight.numpy() for weight in net.trainable_weights] for net in trained]
    egm.fit(normal(10, 2), batch_size=4, verbose=0)
    for net, old_weights in zip(trained, before, strict=True):
        assert all(
            (weight.numpy() != old).any() for weight, old in zip(net.trainable_weights, old_weights, strict=True)
        )
    egm.save(tmp_path / "egm.keras")
    loaded = EGM.load(tmp_path / "egm.keras")
    assert_equal_states(egm, loaded)
    for each in (egm, loaded):
        each.fit(normal(10, 2), batch_size=4, verbose=0)
    assert_equal_states(egm, loaded)
    np.testing.assert_array_equal(egm.sample(5, seed=0), loaded.sample(5, seed=0))
    x = normal(7, 2)
    np.testing.assert_array_equal(egm.dde_real.log_density(x), loaded.dde_real.log_density(x))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_serves_what_calling_it_returns(kind, tmp_path):
    model = make_model(kind)
    model.export(tmp_path / "exported", verbose=False)  # it was never called
    loaded = tf.saved_model.load(tmp_path / "exported")  # owns the variables that serving reads
    for num_points in (1, 5):
        x = normal(num_points, 2)
        for expected, given in zip(tf.nest.flatten(model(x)), tf.nest.flatten(loaded.serve(x)), strict=True):
            np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_export_takes_the_options_of_keras(tmp_path):
    dde = DDE(own_networks("subclass", True)[0], (0.2, 1.5))
    dde.export(tmp_path / "dde", verbose=False, input_signature=[tf.TensorSpec((3, 2))])
    loaded = tf.saved_model.load(tmp_path / "dde")
    assert [tuple(part.shape) for part in loaded.serve(normal(3, 2))] == [(3, 1), (3, 2)]
    with pytest.raises(ValueError, match="not yet been built"):
        DDE(OwnEnergyNet(), 0.3).export(tmp_path / "unknown")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "dde.keras"
    make_model("DDE").save(path)
    return path.read_bytes()


def zip_file(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", ["empty", "text", "head", "half", "tail", "bit", "foreign", "other"])
def test_damaged_files_are_refused(damage, whole_file, tmp_path):
    half = len(whole_file) // 2
    flipped = bytearray(whole_file)
    flipped[half] ^= 4
    path = tmp_path / "damaged.keras"
    content = {
        "empty": b"",
        "text": b"no model at all",
        "head": whole_file[:half],
        "half": whole_file[half:],
        "tail": whole_file[:-5],
        "bit": bytes(flipped),
        "foreign": zip_file(a_txt="?"),
        "other": None,
    }[damage]
    if content is None:
        sequential(keras.layers.Dense(1)).save(path)
    else:
        path.write_bytes(content)
    message = "must be a DDE, got a Sequential" if damage == "other" else r"damaged\.keras is"
    with pytest.raises(ValueError, match=message):
        DDE.load(path)
