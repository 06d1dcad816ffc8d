"""Interruptions, files, bad data and numbers that stop being finite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.callbacks import BackupAndRestore, Callback, ModelCheckpoint
from keras.optimizers import Adam

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
        model = EGM(make_dde(1), make_dde(2), generator, dde_steps=2, seed=seed)
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


class Recorder(Callback):
    """Keeps what each step saw: the first coordinates of its points."""

    def __init__(self, model):
        super().__init__()
        self.batches = []
        as_points = (model if isinstance(model, DDE) else model.dde_real)._as_points

        def record(x):
            self.batches.append(np.array(x)[:, 0])
            return as_points(x)

        (model if isinstance(model, DDE) else model.dde_real)._as_points = record


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
