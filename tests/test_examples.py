"""The notebooks in examples/: what is kept of their last whole run, their style, and short runs of them."""

import itertools
import shutil

import imageio.v3 as iio
import nbformat
import numpy as np
import pytest
from test_example_data import write_faces
from test_tutorial import ROOT, check_outputs, code_cells, execute_copy, num_lines

from energy_models import EGM

EXAMPLES = ROOT / "examples"


def read(name):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def run(folder, name, **settings):
    """Execute a notebook, with settings, in a copy of the project; return it."""
    shutil.copytree(EXAMPLES / "example_models", folder / "examples" / "example_models")
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "images.csv", folder / "benchmarks")
    return execute_copy(folder, EXAMPLES / f"{name}.ipynb", **settings)


def texts(notebook, kind):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    found = [output.get("data", {}).get(kind, "") for output in outputs]
    return "\n\n".join(found + [output.get("text", "") for output in outputs if kind == "text/plain"])


def table(notebook, header):
    """Rows of cells of the first Markdown table whose first column is called ``header``."""
    lines = texts(notebook, "text/markdown").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("name", ["density_benchmark", "images", "your_data"])
def test_kept_example_is_one_clean_run(name):
    notebook = read(name)
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 3_500_000
    check_outputs(notebook)
    assert max(num_lines(cell) for cell in code_cells(notebook)) <= 40
    assert sum(cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells) == 1


def test_kept_tables_of_the_benchmark():
    notebook = read("density_benchmark")
    for kind, *cells in table(notebook, "density"):
        for cell in cells:
            error, standard_error = map(float, cell.split(" ± "))
            # Fitting a Gaussian in 63 dimensions to 20,000 rows costs 0.05 nats: at most twice that.
            assert -0.1 < error < 3 * standard_error + 1e-3, (kind, error)
    for _, kernels, mixture, *_, ours, _ in table(notebook, "table"):
        (kernels, _), (mixture, _), (ours, error) = (map(float, cell.split(" ± ")) for cell in (kernels, mixture, ours))
        assert ours > max(kernels, mixture) - 0.05 - error
    for dim, right, wrong, formula in table(notebook, "d"):
        np.testing.assert_allclose(float(formula), -int(dim) / 2 * np.log(2 - 1 / int(dim)), atol=1e-3)
        assert abs(float(right)) < 1e-6
        np.testing.assert_allclose(float(wrong), float(formula), atol=0.1 if int(dim) <= 8 else 0.3)


def test_kept_table_of_your_data_compares_as_the_notebook_says():
    notebook = read("your_data")
    held_out = {row[0]: float(row[1].split()[0]) for row in table(notebook, "density")}
    assert held_out["DensityEstimator"] > held_out["kernel density"]
    areas = {row[0]: float(row[-1]) for row in table(notebook, "filled in by")}
    assert areas["mean of the draws"] < areas["neighbours"] < areas["mean"]


def test_kept_images():
    notebook = read("images")
    scores = {row[0]: row[2] for row in table(notebook, "images | log density above a typical test image (nats)")}
    assert all(float(scores[name]) > 0.95 for name in ("uniform noise", "shuffled pixels", "inverted"))
    rows = {row[0]: row[1:] for row in table(notebook, "images | KL(images, data) (nats)")}
    divergences, sure = ({name: float(row[i].strip("%")) for name, row in rows.items()} for i in (0, 1))
    assert divergences["test images"] < divergences["corrected"] < divergences["generated"] < 0.02
    assert 85 < sure["generated"] < sure["corrected"] < sure["test images"]
    assert len(iio.imread(EXAMPLES / "example_images" / "mnist.gif")) > 20


# ---------------------------------------------------------------------------------------------- short runs


@pytest.mark.slow
def test_short_density_benchmark(tmp_path):
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    parts = {part: 3 * rng.standard_normal((size, 2)) + 1 for part, size in (("train", 2500), ("test", 500))}
    np.savez(tmp_path / "data" / "normal.npz", **parts)
    settings = {"SPLITS": 2, "MAX_STEPS": 60, "ROWS": 2500, "DIMS": "2 3", "TABLES": "iris", "PATCHES": "patches_3x3"}
    notebook = run(tmp_path, "density_benchmark", DATA_DIR=tmp_path / "data", SEED=1, **settings)
    check_outputs(notebook)
    rows = {name: cells for name, *cells in table(notebook, "table")}
    assert list(rows) == ["iris", "normal"]
    # All but the kernels know this density: their log-likelihood is minus the entropy.
    for cell in (rows["normal"][1], rows["normal"][-2]):
        assert abs(float(cell.split(" ± ")[0]) + 2 * (np.log(3) + 0.5 * np.log(2 * np.pi * np.e))) < 0.15
    assert sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["celeba", "stacked_digits"])
def test_short_images(tmp_path, dataset):
    write_faces(tmp_path / "data")
    settings = {"DATASET": dataset, "DATA_DIR": tmp_path / "data", "OUTPUT_DIR": "pictures", "NUM_IMAGES": 200}
    notebook = run(tmp_path, "images", STEPS=2, DENSITY_STEPS=2, SEED=1, **settings)
    check_outputs(notebook)
    pictures = tmp_path / "examples" / "pictures"
    assert {path.name for path in pictures.iterdir()} == {f"live_{dataset}.gif", f"{dataset}.keras"}
    egm = EGM.load(pictures / f"{dataset}.keras")
    assert egm.sample(2, seed=0).shape == ((2, 32, 32, 3) if dataset == "celeba" else (2, 8, 8, 3))
    assert len(table(notebook, "images | KL(images, data) (nats)")) == 3


@pytest.mark.slow
def test_short_your_data(tmp_path):
    notebook = run(tmp_path, "your_data", MAX_STEPS=20, NUM_SPLITS=2, SEED=1)
    check_outputs(notebook)
    names = ["DensityEstimator", "kernel density", "mixture"]
    assert [row[0] for row in table(notebook, "density")] == names
    assert [row[0] for row in table(notebook, "split")] == ["0", "1"]
    assert [row[0] for row in table(notebook, "filled in by")][-1] == "mean of the draws"
    assert "turned images are among the 24 lowest" in texts(notebook, "text/plain")
