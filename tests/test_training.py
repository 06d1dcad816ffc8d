"""Interruptions, files, bad data and numbers that stop being finite."""

import contextlib
import io
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import resumable_run
import tensorflow as tf
from keras.callbacks import BackupAndRestore, Callback, ModelCheckpoint
from keras.optimizers import SGD, Adam

from egm_dde.visualization import write_gif
from energy_models import DDE, EGM, build_energy_net, build_generator

KINDS = ["DDE", "EGM"]
NUM_POINTS, BATCH_SIZE, EPOCHS = 22, 4, 4  # the last of the 6 batches of an epoch is smaller


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_model(kind, noise_std=(0.2, 1.5), seed=3, **options):
    """Make a small compiled model."""

    def make_dde(net_seed):
        net = build_energy_net(2, isinstance(noise_std, tuple), (6,), num_features=4, seed=net_seed)
        return DDE(net, noise_std, seed=seed)

    if kind == "DDE":
        model = make_dde(1)
        model.compile(Adam(0.01), **options)
    else:
        generator = build_generator(widths=(6,), num_features=4, seed=3)
        model = EGM(make_dde(1), make_dde(2), generator, dde_steps=1, seed=seed)
        model.compile(Adam(0.01), Adam(0.01), **options)
    return model


def state(model):
    """All that a training step changes: weights of networks and of optimizers."""
    names = ["optimizer"] if isinstance(model, DDE) else ["dde_real_optimizer", "dde_fake_optimizer", "gen_optimizer"]
    variables = [*model.weights, *(variable for name in names for variable in getattr(model, name).variables)]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def assert_equal_states(one, other):
    assert len(one) == len(other)
    for array, another in zip(one, other, strict=True):
        np.testing.assert_array_equal(array, another)


class Batches(keras.utils.PyDataset):
    """Slices of the points."""

    def __init__(self, **options):
        super().__init__(**options)
        self.x = normal(NUM_POINTS, 2)

    def __len__(self):
        return -(-NUM_POINTS // BATCH_SIZE)

    def __getitem__(self, index):
        return (self.x[index * BATCH_SIZE : (index + 1) * BATCH_SIZE],)


class Interrupt(Callback):
    """Ends training as Ctrl-C does, after a number of batches."""

    def __init__(self, num_batches):
        super().__init__()
        self.num_batches = num_batches

    def on_train_batch_end(self, batch, logs=None):
        self.num_batches -= 1
        if self.num_batches < 0:
            raise KeyboardInterrupt


def shuffled_dataset():
    return tf.data.Dataset.from_tensor_slices(normal(NUM_POINTS, 2)).shuffle(NUM_POINTS, seed=5)


DATA = {
    "array": lambda: (normal(NUM_POINTS, 2), {"batch_size": BATCH_SIZE}),
    "array in order": lambda: (normal(NUM_POINTS, 2), {"batch_size": BATCH_SIZE, "shuffle": False}),
    "array in parts": lambda: (normal(NUM_POINTS, 2), {"batch_size": BATCH_SIZE, "steps_per_epoch": 4}),
    "dataset": lambda: (shuffled_dataset().batch(BATCH_SIZE), {}),
    "endless dataset": lambda: (shuffled_dataset().repeat().batch(BATCH_SIZE), {"steps_per_epoch": 5}),
    "PyDataset": lambda: (Batches(), {}),
    "PyDataset with workers": lambda: (Batches(workers=2), {}),
}


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def uninterrupted():
    """Histories and states of runs that nothing interrupts, by kind of model and data."""
    runs = {}

    def run(kind, data_kind):
        if (kind, data_kind) not in runs:
            model = make_model(kind)
            data, options = DATA[data_kind]()
            history = model.fit(data, epochs=EPOCHS, verbose=0, **options).history
            runs[kind, data_kind] = history, state(model)
        return runs[kind, data_kind]

    return run


@pytest.mark.parametrize("data_kind", DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_restored_training_goes_on_as_if_nothing_had_happened(kind, data_kind, uninterrupted, tmp_path):
    if kind == "EGM" and data_kind not in ("array", "endless dataset"):
        pytest.skip("the order of the data is that of the DDE")
    expected_history, expected_state = uninterrupted(kind, data_kind)
    for num_batches in (9, 5):  # each time in the middle of an epoch, after another one
        model = make_model(kind)
        data, options = DATA[data_kind]()
        with pytest.raises(KeyboardInterrupt):
            model.fit(
                data,
                epochs=EPOCHS,
                verbose=0,
                callbacks=[BackupAndRestore(tmp_path / "backup"), Interrupt(num_batches)],
                **options,
            )
    model = make_model(kind)
    data, options = DATA[data_kind]()
    history = model.fit(data, epochs=EPOCHS, verbose=0, callbacks=BackupAndRestore(tmp_path / "backup"), **options)
    assert 0 < history.epoch[0] <= history.epoch[-1] == EPOCHS - 1
    for name, values in history.history.items():
        assert values == expected_history[name][history.epoch[0] :]
    assert_equal_states(state(model), expected_state)


@pytest.mark.parametrize("data_kind", ["array", "array in parts", "dataset", "endless dataset"])
def test_training_restored_within_an_epoch_ends_it_where_it_would_have(data_kind, uninterrupted, tmp_path):
    expected_history, expected_state = uninterrupted("DDE", data_kind)
    for last in (False, True):
        model = make_model("DDE")
        data, options = DATA[data_kind]()
        callbacks = [BackupAndRestore(tmp_path / "backup", save_freq=1), *([] if last else [Interrupt(8)])]
        with pytest.raises(KeyboardInterrupt) if not last else pytest.MonkeyPatch.context():
            history = model.fit(data, epochs=EPOCHS, verbose=0, callbacks=callbacks, **options)
    first = history.epoch[0]
    assert 0 < first < history.epoch[-1] == EPOCHS - 1
    assert history.history["loss"][1:] == expected_history["loss"][first + 1 :]
    assert_equal_states(state(model), expected_state)


@pytest.mark.parametrize("data_kind", ["array", "array in parts", "dataset", "endless dataset", "PyDataset"])
def test_training_goes_on_from_a_checkpoint(data_kind, uninterrupted, tmp_path):
    expected_history, expected_state = uninterrupted("DDE", data_kind)
    model = make_model("DDE")
    data, options = DATA[data_kind]()
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.keras")
    model.fit(data, epochs=2, verbose=0, callbacks=checkpoint, **options)
    loaded = keras.saving.load_model(tmp_path / "2.keras")
    data, options = DATA[data_kind]()
    history = loaded.fit(data, initial_epoch=2, epochs=EPOCHS, verbose=0, **options)
    assert history.history["loss"] == expected_history["loss"][2:]
    assert_equal_states(state(loaded), expected_state)


def test_each_point_is_seen_once_in_a_pass_and_each_pass_has_an_order_of_its_own():
    orders = {}
    for name, seed in (("first", 3), ("again", 3), ("other seed", 4)):
        keras.utils.set_random_seed(len(orders))  # Keras's own shuffle would follow the global seeds
        model = make_model("DDE", seed=seed, run_eagerly=True)
        batches = record_batches(model)
        data, options = DATA["array"]()
        for _ in range(2):  # fit may be called again and again
            model.fit(data, epochs=2, verbose=0, **options)
        passes = np.split(np.concatenate(batches), 4)
        for one in passes:
            np.testing.assert_array_equal(np.sort(one), np.sort(data[:, 0]))
        assert len({tuple(one) for one in passes}) == 4
        orders[name] = np.concatenate(passes)
    np.testing.assert_array_equal(orders["first"], orders["again"])
    assert (orders["first"] != orders["other seed"]).any()


def test_epochs_of_any_length_go_through_the_data_again_and_again():
    model = make_model("DDE", run_eagerly=True)
    batches = record_batches(model)
    data, options = DATA["array in parts"]()  # 6 batches a pass, 4 steps an epoch
    model.fit(data, epochs=3, verbose=0, **options)
    first, second = np.split(np.concatenate(batches), 2)
    assert sorted(first) == sorted(second) == sorted(data[:, 0])


def record_batches(model):
    """Keep the first coordinates of the points of each training step; the model has to run eagerly."""
    batches, original = [], model.denoising_loss

    def recording(x, *arguments, **options):
        batches.append(x.numpy()[:, 0])
        return original(x, *arguments, **options)

    model.denoising_loss = recording
    return batches


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_written_by_hand_repeats_itself_and_fit(kind):
    states = []
    data, options = DATA["array in order"]()
    for way in ("fit", "loop", "loop", "loaded"):
        model = make_model(kind)
        if way == "fit":
            model.fit(data, epochs=2, verbose=0, **options)
        else:
            for step in range(12):
                if way == "loaded" and step == 5:
                    model = reload(model)
                start = step % 6 * BATCH_SIZE
                model.train_on_batch(data[start : start + BATCH_SIZE])
        states.append(state(model))
    for other in states[1:]:
        assert_equal_states(states[0], other)


def reload(model):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return keras.saving.load_model(path)


@pytest.mark.parametrize("restored", ["without its weights", "torn", "without the file of the epoch"])
def test_a_backup_that_a_kill_tore_is_mended(restored, uninterrupted, tmp_path):
    expected_history, expected_state = uninterrupted("DDE", "array")
    backup = tmp_path / "backup"
    metadata = backup / "training_metadata.json"
    model = make_model("DDE")
    data, options = DATA["array"]()
    with pytest.raises(KeyboardInterrupt):
        model.fit(data, epochs=EPOCHS, verbose=0, callbacks=[BackupAndRestore(backup), Interrupt(14)], **options)
    first_epoch = 2
    if restored == "torn":
        metadata.write_text("")
    elif restored == "without its weights":
        (backup / "latest.weights.h5").unlink()
        first_epoch = 0
    else:
        metadata.unlink()
    model = make_model("DDE")
    history = model.fit(data, epochs=EPOCHS, verbose=0, callbacks=BackupAndRestore(backup), **options)
    assert history.epoch[0] == first_epoch
    assert history.history["loss"] == expected_history["loss"][first_epoch:]
    assert_equal_states(state(model), expected_state)


def test_training_again_in_one_process_starts_at_the_first_epoch(tmp_path):
    model = make_model("DDE")
    data, options = DATA["array"]()
    callbacks = [BackupAndRestore(tmp_path / "backup"), Interrupt(8)]
    with pytest.raises(KeyboardInterrupt):
        model.fit(data, epochs=2, verbose=0, callbacks=callbacks, **options)
    model.fit(data, epochs=2, verbose=0, callbacks=callbacks[:1], **options)
    assert model.fit(data, epochs=2, verbose=0, **options).epoch == [0, 1]


def test_killed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    program = Path(__file__).with_name("resumable_run.py")
    delays = [random.uniform(0.0, 0.5) for _ in range(2)]

    def run_and_kill(kind):
        folder = tmp_path / kind
        folder.mkdir()
        num_kills = 0
        for delay in [*delays, None]:
            process = subprocess.Popen([sys.executable, program, kind, folder], stderr=subprocess.PIPE)
            try:
                if delay is not None:
                    before = newest_backup(folder)
                    while process.poll() is None and newest_backup(folder) == before:
                        time.sleep(0.01)
                    time.sleep(delay)
                    process.send_signal(signal.SIGKILL)
                _, errors = process.communicate(timeout=300)
            finally:
                process.kill()
            num_kills += process.returncode == -signal.SIGKILL
            if process.returncode == 0:
                break
        assert process.returncode == 0, errors.decode()
        return num_kills, np.load(folder / "result.npz")

    with ThreadPoolExecutor() as executor:
        results = dict(zip(KINDS, executor.map(run_and_kill, KINDS), strict=True))
    for kind, (num_kills, result) in results.items():
        assert num_kills > 0, delays
        history, expected_state = resumable_run.train(kind, [])
        assert len(result["epochs"]) < resumable_run.EPOCHS, delays
        for name, values in history.history.items():
            assert result[name].tolist() == values[result["epochs"][0] :], delays
        assert_equal_states([result[f"arr_{index}"] for index in range(len(expected_state))], expected_state)


def newest_backup(folder):
    weights = folder / "backup" / "latest.weights.h5"
    return weights.stat().st_mtime_ns if weights.exists() else None


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


WRITERS = {
    "model.keras": lambda model, path: model.save(path),
    "folder": lambda model, path: model.save(path, zipped=False),
    "model.weights.h5": lambda model, path: model.save_weights(path),
    "exported": lambda model, path: model.export(path, verbose=False),
    "picture.gif": lambda model, path: write_gif(path, np.random.default_rng(0).integers(0, 256, (3, 99, 99, 3), "u1")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name, tmp_path):
    model, path = make_model("EGM"), tmp_path / name
    WRITERS[name](model, path)
    before = contents(path)
    model.fit(normal(8, 2), verbose=0)
    for num_bytes in (0, 3000):
        with full_disk(num_bytes), pytest.raises((OSError, RuntimeError, tf.errors.OpError)):
            WRITERS[name](model, path)
    assert contents(path) == before
    assert [each.name for each in tmp_path.iterdir()] == [name]
    WRITERS[name](model, path)
    assert (contents(path) != before) == (name != "picture.gif")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write model\.keras to"):
        make_model("DDE").save(tmp_path / "nowhere" / "model.keras")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_goes_on_like_the_saved_one(kind, tmp_path):
    model = make_model(kind)
    data, options = DATA["array"]()
    model.fit(data, epochs=1, verbose=0, **options)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = type(model).load(tmp_path / "model.keras")
    restored = make_model(kind)
    restored.load_weights(tmp_path / "model.weights.h5")
    assert_equal_states(state(model), state(loaded))
    assert_equal_states(state(model), state(restored))
    for each in (model, loaded, restored):
        each.fit(data, initial_epoch=1, epochs=2, verbose=0, **options)
    assert_equal_states(state(model), state(loaded))
    assert_equal_states(state(model), state(restored))


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
    assert_equal_states(state(egm), state(loaded))
    for each in (egm, loaded):
        each.fit(normal(10, 2), batch_size=4, verbose=0)
    assert_equal_states(state(egm), state(loaded))
    np.testing.assert_array_equal(egm.sample(5, seed=0), loaded.sample(5, seed=0))
    x = normal(7, 2)
    np.testing.assert_array_equal(egm.dde_real.log_density(x), loaded.dde_real.log_density(x))


@pytest.mark.parametrize("in_range", [False, True], ids=["one level", "range"])
def test_an_exported_dde_serves_log_density_and_score(in_range, tmp_path):
    dde = make_model("DDE", (0.2, 1.5) if in_range else 0.3)
    dde.export(tmp_path / "dde", verbose=False)
    served = tf.saved_model.load(tmp_path / "dde")
    for n_points in (1, 5):
        x = normal(n_points, 2)
        for expected, given in zip(dde(x), served.serve(x), strict=True):
            np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)
        if in_range:
            levels = np.linspace(0.3, 1.2, n_points).astype(np.float32)
            for expected, given in zip(dde(x, noise_std=levels), served.serve_level(x, levels), strict=True):
                np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_an_exported_egm_serves_samples_and_densities(tmp_path):
    egm = make_model("EGM")
    egm.fit(normal(8, 2), verbose=0)
    egm.export(tmp_path / "egm", verbose=False)
    served = tf.saved_model.load(tmp_path / "egm")
    z, x = normal(5, 2), normal(4, 2)
    np.testing.assert_allclose(served.serve(z), egm(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(served.sample(6, 9), egm.sample(6, seed=9), rtol=1e-5, atol=1e-6)
    for expected, given in zip(egm.dde_real(x), served.log_density_and_score(x), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_export_knows_its_limits(tmp_path):
    with pytest.raises(ValueError, match="no options but verbose, got \\['input_signature'\\]"):
        make_model("DDE").export(tmp_path / "dde", input_signature=[])
    with pytest.raises(ValueError, match="does not know the shape of its points"):
        DDE(OwnEnergyNet(), 0.3).export(tmp_path / "dde")


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
    message = "holds a Sequential, not a DDE" if damage == "other" else r"damaged\.keras is"
    with pytest.raises(ValueError, match=message):
        DDE.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.keras"):
        EGM.load(tmp_path / "nothing.keras")


def contents(path):
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    return path.read_bytes()
