import csv
import itertools
import os
import re
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
from nbconvert import ScriptExporter
from small_models import assert_equal_arrays

from egm_dde.notebook import METADATA
from energy_models import DDE, EGM, build_energy_net, build_generator

ROOT = Path(__file__).parent.parent
X = np.random.default_rng(0).standard_normal((24, 2)).astype(np.float32)
EPOCHS = 3
LOSSES = {"DDE": ["loss"], "EGM": ["gen_loss", "loss_dde_fake", "loss_dde_real"]}


def make_model(kind, **options):
    ddes = [DDE(build_energy_net(2, True, (5,), num_features=3, seed=seed), (0.2, 1.5), seed=1) for seed in (1, 2)]
    model = ddes[0] if kind == "DDE" else EGM(*ddes, build_generator(widths=(5,), num_features=3), dde_steps=2, seed=1)
    model.compile(*[Adam(0.01) for _ in LOSSES[kind][-2:]], **options)
    return model


def fit(model, **options):
    return model.fit(X, batch_size=4, epochs=EPOCHS, **{"verbose": 0} | options)


@pytest.fixture(scope="module")
def plain():
    """Runs without anything, by kind of model."""
    return {kind: fit(make_model(kind)) for kind in LOSSES}


# What has to be true of a run with something, compared with a plain one.


def is_plain(run, plain):
    assert run.history == plain.history
    assert_equal_arrays(run.model.get_weights(), plain.model.get_weights())


def has_stopped_early(run, plain):
    assert len(run.epoch) == 2


def is_as_long(run, plain):  # rounding differs
    assert {name: len(values) for name, values in run.history.items()} == {name: EPOCHS for name in plain.history}
    assert np.isfinite(list(run.history.values())).all()


def has_validated(run, plain):
    expected = run.model.evaluate(X[:5], batch_size=4, verbose=0, return_dict=True)
    validation = {f"val_{name}": run.history.pop(f"val_{name}") for name in expected}
    assert run.history == plain.history
    assert [values[-1] for values in validation.values()] == list(expected.values())


def has_split(run, plain):
    assert set(run.history) == {*plain.history, *(f"val_{name}" for name in plain.history)}
    assert run.model.num_steps == EPOCHS * 5  # 18 points of 24 in batches of 4


def rows(kind):
    """By name: a check, and options of compile and of fit."""
    batches = tf.data.Dataset.from_tensor_slices(X[:5]).batch(4)
    stop = callbacks.EarlyStopping(LOSSES[kind][-1], 9.0, 1, mode="min")
    return {
        "EarlyStopping": (has_stopped_early, {}, {"callbacks": stop}),
        "CallbackList": (is_plain, {}, {"callbacks": callbacks.CallbackList(add_history=True)}),
        "steps_per_execution": (is_plain, {"steps_per_execution": 3}, {}),
        "steps_per_execution that leaves a rest": (is_plain, {"steps_per_execution": 4}, {}),
        "steps_per_execution longer than an epoch": (is_plain, {"steps_per_execution": 9}, {}),
        "jit_compile": (is_as_long, {"jit_compile": True}, {}),
        "validation_data": (has_validated, {}, {"validation_data": X[:5]}),
        "validation_data with targets": (has_validated, {}, {"validation_data": (X[:5], X[:5, 0])}),
        "validation_data in batches": (has_validated, {}, {"validation_data": batches}),
        "validation_split": (has_split, {}, {"validation_split": 0.25}),
        "verbose": (is_plain, {}, {"verbose": 1}),
    }


FAST = [("DDE", "EarlyStopping"), ("DDE", "validation_data")]
OTHERS = [case for case in itertools.product(LOSSES, rows("DDE")) if case not in FAST]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize(("kind", "name"), FAST + SLOW)
def test_training_with(kind, name, plain):
    check, compile_options, options = rows(kind)[name]
    check(fit(make_model(kind, **compile_options), **options), plain[kind])


@pytest.mark.parametrize("kind", LOSSES)
def test_callbacks_of_keras_write_files_and_leave_training_as_it_is(kind, plain, tmp_path):
    chosen = [
        callbacks.CSVLogger(tmp_path / "log.csv"),
        callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
        callbacks.ModelCheckpoint(tmp_path / "best.keras", LOSSES[kind][-1], save_best_only=True, mode="min"),
        callbacks.TensorBoard(tmp_path / "events"),
        callbacks.TerminateOnNaN(),
    ]
    run = fit(make_model(kind), callbacks=chosen)
    is_plain(run, plain[kind])
    with open(tmp_path / "log.csv", newline="") as file:
        logs = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in logs] == list(range(EPOCHS))
    for name, values in run.history.items():
        np.testing.assert_allclose([float(row[name]) for row in logs], values)
    loaded = type(run.model).load(tmp_path / "best.keras")
    loaded.load_weights(tmp_path / f"{EPOCHS}.weights.h5")
    assert_equal_arrays(loaded.get_weights(), run.model.get_weights())
    assert list((tmp_path / "events").rglob("events*"))


def test_compile_options_are_saved(tmp_path):
    for kind in LOSSES:
        make_model(kind, steps_per_execution=3, jit_compile=True).save(tmp_path / "model.keras")
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
    notebook = nbformat.read(ROOT / "egm_dde.ipynb", 4)
    del notebook.cells[1 + next(i for i, cell in enumerate(notebook.cells) if "egm.save(" in cell.source) :]
    nbformat.write(notebook, tmp_path / "egm_dde.ipynb")  # up to the trained model: test_tutorial.py runs the rest
    parameters = ["-p", "DATASET", "rings", "-p", "EPOCHS", "1", "-p", "OUTPUT_DIR", "pictures"]
    command = [sys.executable, "-m", "papermill", "egm_dde.ipynb", "run.ipynb", *parameters]
    modules = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=modules, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    assert EGM.load(tmp_path / "pictures" / "egm.keras").num_steps == 50
