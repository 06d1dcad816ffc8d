"""Callbacks, options and programs that people already use: one row each."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import nbformat
import numpy as np
import pytest
import tensorflow as tf
from keras import callbacks
from keras.optimizers import Adam
from keras.optimizers.schedules import CosineDecay
from nbconvert import ScriptExporter
from small_models import assert_equal_arrays

from egm_dde.notebook import METADATA
from energy_models import DDE, EGM, build_energy_net, build_generator

ROOT = Path(__file__).parent.parent
X = np.random.default_rng(0).standard_normal((24, 2)).astype(np.float32)
EPOCHS = 3
LOSSES = {"DDE": ["loss"], "EGM": ["gen_loss", "loss_dde_fake", "loss_dde_real"]}


def make_model(kind, learning_rate=0.01, **options):
    ddes = [DDE(build_energy_net(2, True, (5,), num_features=3, seed=seed), (0.2, 1.5), seed=1) for seed in (1, 2)]
    model = ddes[0] if kind == "DDE" else EGM(*ddes, build_generator(widths=(5,), num_features=3), dde_steps=2, seed=1)
    model.compile(*[Adam(learning_rate) for _ in LOSSES[kind][-2:]], **options)
    return model


class Row:
    """How a run with something differs from a plain one, and what has to be true of it."""

    def __init__(self, check, callbacks=lambda folder, kind: None, compile=lambda: {}, fit=lambda: {}):
        self.check, self.callbacks, self.compile, self.fit = check, callbacks, compile, fit


def is_plain(run, folder, plain):
    assert run.history == plain.history
    assert_equal_arrays(run.model.get_weights(), plain.model.get_weights())


def is_nearly_plain(run, folder, plain):
    for name, values in plain.history.items():
        np.testing.assert_allclose(run.history[name], values, rtol=1e-4)


def is_as_long(run, folder, plain):
    assert {name: len(values) for name, values in run.history.items()} == {name: EPOCHS for name in plain.history}
    assert np.isfinite(list(run.history.values())).all()


def has_logged(run, folder, plain):
    is_plain(run, folder, plain)
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(EPOCHS))
    for name, values in plain.history.items():
        np.testing.assert_allclose([float(row[name]) for row in rows], values)


def has_checkpoints(run, folder, plain):
    is_plain(run, folder, plain)
    loaded = type(run.model).load(folder / f"{EPOCHS}.keras")
    loaded.load_weights(folder / f"{EPOCHS}.weights.h5")
    np.testing.assert_array_equal(loaded.get_weights()[1], run.model.get_weights()[1])
    assert (folder / "best.keras").exists()


def has_stopped_early(run, folder, plain):
    assert len(next(iter(run.history.values()))) == 2


def has_events(run, folder, plain):
    is_plain(run, folder, plain)
    assert list((folder / "events").rglob("events*"))


def has_validated(run, folder, plain):
    assert set(run.history) == {*plain.history, *(f"val_{name}" for name in plain.history)}
    for name, values in plain.history.items():
        assert run.history[name] == values
    expected = run.model.evaluate(X[:5], batch_size=4, verbose=0, return_dict=True)
    assert {f"val_{name}": value for name, value in expected.items()} == {
        name: values[-1] for name, values in run.history.items() if name.startswith("val_")
    }


def has_split(run, folder, plain):
    assert set(run.history) == {*plain.history, *(f"val_{name}" for name in plain.history)}
    assert run.model.num_steps == EPOCHS * 5  # 18 points of 24 in batches of 4


def has_slowed_down(run, folder, plain):
    np.testing.assert_allclose(run.model.optimizer.learning_rate, 0.0, atol=1e-9)
    is_as_long(run, folder, plain)


ROWS = {
    "CSVLogger": Row(has_logged, lambda folder, kind: callbacks.CSVLogger(folder / "log.csv")),
    "ModelCheckpoint": Row(
        has_checkpoints,
        lambda folder, kind: [
            callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
            callbacks.ModelCheckpoint(folder / "{epoch}.weights.h5", save_weights_only=True),
            callbacks.ModelCheckpoint(folder / "best.keras", LOSSES[kind][-1], save_best_only=True, mode="min"),
        ],
    ),
    "EarlyStopping": Row(
        has_stopped_early, lambda folder, kind: callbacks.EarlyStopping(LOSSES[kind][-1], 9.0, 1, mode="min")
    ),
    "TerminateOnNaN": Row(is_plain, lambda folder, kind: [callbacks.TerminateOnNaN()]),
    "TensorBoard": Row(has_events, lambda folder, kind: callbacks.TensorBoard(folder / "events")),
    "CallbackList": Row(is_plain, lambda folder, kind: callbacks.CallbackList(add_history=True)),
    "a learning-rate schedule": Row(has_slowed_down, compile=lambda: {"learning_rate": CosineDecay(0.01, EPOCHS * 6)}),
    "steps_per_execution": Row(is_plain, compile=lambda: {"steps_per_execution": 3}),
    "steps_per_execution that leaves a rest": Row(is_plain, compile=lambda: {"steps_per_execution": 4}),
    "steps_per_execution longer than an epoch": Row(is_plain, compile=lambda: {"steps_per_execution": 9}),
    "jit_compile": Row(is_as_long, compile=lambda: {"jit_compile": True}),
    "run_eagerly": Row(is_nearly_plain, compile=lambda: {"run_eagerly": True}),
    "validation_data": Row(has_validated, fit=lambda: {"validation_data": X[:5]}),
    "validation_data with targets": Row(has_validated, fit=lambda: {"validation_data": (X[:5], X[:5, 0])}),
    "validation_data in batches": Row(
        has_validated, fit=lambda: {"validation_data": tf.data.Dataset.from_tensor_slices(X[:5]).batch(4)}
    ),
    "validation_split": Row(has_split, fit=lambda: {"validation_split": 0.25}),
    "verbose": Row(is_plain, fit=lambda: {"verbose": 1}),
}

FAST_FOR_EGM = ("CSVLogger",)
SLOW_FOR_DDE = ("steps_per_execution", "steps_per_execution longer than an epoch", "verbose", "TerminateOnNaN")
SLOW_FOR_DDE += ("steps_per_execution that leaves a rest", "jit_compile", "run_eagerly", "CallbackList")
SLOW_FOR_DDE += ("validation_data with targets", "validation_data in batches", "TensorBoard", "validation_split")
CASES = [pytest.param("DDE", name, marks=pytest.mark.slow if name in SLOW_FOR_DDE else ()) for name in ROWS]
CASES += [pytest.param("EGM", name, marks=() if name in FAST_FOR_EGM else pytest.mark.slow) for name in ROWS]


@pytest.fixture(scope="module")
def plain():
    """Runs without anything, by kind of model."""
    return {kind: make_model(kind).fit(X, batch_size=4, epochs=EPOCHS, verbose=0) for kind in LOSSES}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_training_with(kind, name, plain, tmp_path):
    row = ROWS[name]
    model = make_model(kind, **row.compile())
    options = {"verbose": 0, "callbacks": row.callbacks(tmp_path, kind), **row.fit()}
    run = model.fit(X, batch_size=4, epochs=EPOCHS, **options)
    row.check(run, tmp_path, plain[kind])


def test_compile_options_are_saved(tmp_path):
    for kind in LOSSES:
        model = make_model(kind, steps_per_execution=3, jit_compile=True)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert (loaded.steps_per_execution, loaded.jit_compile) == (3, True)


def test_steps_per_execution_that_leave_a_rest_need_data_that_end():
    batches = tf.data.Dataset.from_tensor_slices(X).batch(4)
    models = [make_model("DDE"), make_model("DDE", steps_per_execution=4)]
    losses = [model.fit(batches, epochs=2, verbose=0).history for model in models]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="steps_per_epoch must be a multiple of steps_per_execution=4, got 6"):
        models[1].fit(batches, steps_per_epoch=6, verbose=0)


def test_lines_of_markdown_end_at_120():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")):
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        # Rows of tables and a link alone on its line cannot be broken.
        lines = [line for line in text.splitlines() if not re.match(r"\||!?\[[^]]*\]\(\S*\)$", line)]
        assert [line for line in lines if len(line) > 120] == [], path.relative_to(ROOT)


def test_notebooks_become_scripts_of_plain_python(tmp_path):
    for path in (*ROOT.glob("*.ipynb"), *ROOT.glob("examples/*.ipynb")):
        notebook = nbformat.read(path, 4)
        script, _ = ScriptExporter().from_notebook_node(notebook)
        assert notebook.metadata == METADATA and script.startswith("#!/usr/bin/env python\n")
        (tmp_path / f"{path.stem}.py").write_text(script, encoding="utf-8")
    # Ruff finds syntax, commands and functions that only IPython knows.
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "."]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.slow
def test_papermill_sets_the_parameters_of_the_notebook(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "egm_dde", tmp_path / "egm_dde")
    notebook = nbformat.read(ROOT / "egm_dde.ipynb", 4)
    del notebook.cells[1 + next(i for i, cell in enumerate(notebook.cells) if "egm.save(" in cell.source) :]
    nbformat.write(notebook, tmp_path / "egm_dde.ipynb")  # up to the trained model: test_tutorial.py runs the rest
    parameters = ["-p", "DATASET", "rings", "-p", "EPOCHS", "1", "-p", "OUTPUT_DIR", "pictures"]
    command = [sys.executable, "-m", "papermill", "egm_dde.ipynb", "run.ipynb", *parameters]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    cells = [cell for cell in nbformat.read(tmp_path / "run.ipynb", 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells if cell.source.strip())
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert EGM.load(tmp_path / "pictures" / "egm.keras").num_steps == 50
