"""The notebooks in examples/: what is kept of their last whole run, their style, and short runs of them."""

import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import keras
import nbformat
import numpy as np
import pytest
from test_example_data import write_faces, write_mnist
from test_tutorial import check_outputs, code_cells, num_lines

from egm_dde.notebook import main as execute
from energy_models import EGM

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOKS = ("density_benchmark", "images")


def run(folder, name, **settings):
    """Execute a notebook, with settings, in a copy of the project; return it."""
    (folder / "examples").mkdir()
    for path in [*ROOT.glob("*.py"), *EXAMPLES.glob("*.py"), EXAMPLES / f"{name}.ipynb"]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    shutil.copytree(ROOT / "egm_dde", folder / "egm_dde")
    shutil.copytree(EXAMPLES / "example_models", folder / "examples" / "example_models")
    with pytest.MonkeyPatch.context() as environment:
        for setting, value in settings.items():
            environment.setenv(setting, str(value))
        assert execute([str(folder / "examples" / f"{name}.ipynb")]) == 0
    return nbformat.read(folder / "examples" / f"{name}.ipynb", as_version=4)


def texts(notebook, kind):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    found = [output.get("data", {}).get(kind, "") for output in outputs]
    return "\n\n".join(found + [output.get("text", "") for output in outputs if kind == "text/plain"])


def table(notebook, header):
    """Rows of cells of the first Markdown table whose first column is called ``header``."""
    lines = texts(notebook, "text/markdown").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def mode_counts(notebook, num_modes):
    """Rows of the table that counts so many modes."""
    names = ["start", "generated", "corrected", "test images (floor)"]
    found = re.findall(
        rf"^\| (.+) \| \d+ \| (\d+) of {num_modes} \| ([\d.]+|inf) \| (\d+)% \|$",
        texts(notebook, "text/markdown"),
        re.MULTILINE,
    )
    assert [row[0] for row in found] == names
    return [{"covered": int(row[1]), "divergence": float(row[2]), "sure": int(row[3])} for row in found]


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_example_is_one_clean_run(name):
    path = EXAMPLES / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 1_500_000
    check_outputs(notebook)
    assert max(num_lines(cell) for cell in code_cells(notebook)) <= 40
    assert sum(cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells) == 1


def test_kept_densities_come_close_to_the_truth_and_not_above_it():
    rows = table(nbformat.read(EXAMPLES / "density_benchmark.ipynb", as_version=4), "density")
    assert [(row[0], int(row[1])) for row in rows] == [
        (kind, dim) for kind in ("gaussian", "mixture", "banana") for dim in (2, 6, 8, 21, 43, 63)
    ]
    for kind, dim, _, highest, lowest, _ in rows:
        largest = {2: 0.02, 6: 0.05, 8: 0.05, 21: 0.2, 43: 0.5, 63: 0.5}[int(dim)]
        for cell in (highest, lowest):
            error, standard_error = map(float, re.match(r"\[?([+-][\d.]+) ± ([\d.]+)", cell).groups())
            assert abs(error) < largest + 2 * standard_error, (kind, dim, cell)
        assert error < 3 * standard_error + 1e-3, (kind, dim, lowest)  # eighteen of them: two would be too few


def test_kept_table_of_the_published_fault_agrees_with_its_formula():
    for dim, right, _, measured, formula, _ in table(
        nbformat.read(EXAMPLES / "density_benchmark.ipynb", as_version=4), "d"
    ):
        np.testing.assert_allclose(float(formula), int(dim) / 2 * np.log(2 - 1 / int(dim)), atol=1e-3)
        assert abs(float(right)) < 1e-6
        if int(dim) <= 8:
            np.testing.assert_allclose(float(measured), float(formula), atol=0.1)


def test_kept_images():
    notebook = nbformat.read(EXAMPLES / "images.ipynb", as_version=4)
    scores = {row[0]: row[3] for row in table(notebook, "images")}
    assert all(float(scores[name]) > 0.95 for name in ("uniform noise", "shuffled pixels", "inverted"))
    start, generated, corrected, floor = mode_counts(notebook, 10)
    assert generated["covered"] == corrected["covered"] == floor["covered"] == 10
    assert start["sure"] < 80 and 92 <= generated["sure"] < corrected["sure"] < floor["sure"]
    assert floor["divergence"] < corrected["divergence"] < generated["divergence"] < 0.01
    frechet_distances = [float(row[-1]) for row in table(notebook, "images | precision")]  # in the same order
    assert frechet_distances == sorted(frechet_distances, reverse=True)
    frames = iio.imread(EXAMPLES / "example_images" / "digits.gif")
    assert len(frames) > 20


# ---------------------------------------------------------------------------------------------- short runs


@pytest.mark.slow
def test_short_density_benchmark(tmp_path):
    data = tmp_path / "data" / "POWER"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in (("train", 300), ("val", 60), ("test", 50)):
        np.save(data / f"{part}.npy", rng.standard_normal((size, 6)) * 3 + 1)
    notebook = run(
        tmp_path, "density_benchmark", STEPS=2, DIMS="2 3", SHIPPED="wine", DATA_DIR=tmp_path / "data", SEED=1
    )
    check_outputs(notebook)
    assert [row[:2] for row in table(notebook, "density")] == [
        [kind, dim] for kind in ("gaussian", "mixture", "banana") for dim in ("2", "3")
    ]
    tables = texts(notebook, "text/markdown")
    assert "| wine | 13 | 106 / 36 / 36 |" in tables
    assert "| POWER | 6 | 300 / 60 / 50 |" in tables
    # A mixture of Gaussians knows this density: its log-likelihood is minus the entropy.
    power = next(line for line in tables.splitlines() if line.startswith("| POWER"))
    mixture = float(power.strip(" |").split("|")[-2].split("±")[0])
    assert abs(mixture + 6 * (np.log(3) + 0.5 * np.log(2 * np.pi * np.e))) < 1
    missing = texts(notebook, "text/plain")
    assert all(f"{name} needs" in missing for name in ("GAS", "HEPMASS", "MINIBOONE", "BSDS300"))
    assert "POWER needs" not in missing


@pytest.mark.slow
def test_short_images_with_backup(tmp_path):
    backup = tmp_path / "backup"
    notebook = run(tmp_path, "images", STEPS=2, DENSITY_STEPS=2, SEED=1, BACKUP_DIR=backup, OUTPUT_DIR="pictures")
    check_outputs(notebook)
    pictures = tmp_path / "examples" / "pictures"
    written = {path.name for path in pictures.iterdir()}
    assert written == {"digits.gif", "digits.png", "digits.keras", "digits_generator.keras"}
    assert len(mode_counts(notebook, 10)) == 4
    generator = keras.saving.load_model(pictures / "digits_generator.keras", compile=False)
    z = np.random.default_rng(0).standard_normal((3, *generator.input_shape[1:])).astype(np.float32)
    np.testing.assert_allclose(generator(z), EGM.load(pictures / "digits.keras")(z), atol=1e-5)
    assert "accuracy on 360 test images" in texts(notebook, "text/plain")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["celeba", "stacked_mnist"])
def test_short_images_from_local_files(tmp_path, dataset):
    write_faces(tmp_path / "data")
    write_mnist(tmp_path / "data")
    notebook = run(
        tmp_path, "images", STEPS=1, DENSITY_STEPS=1, DATASET=dataset, DATA_DIR=tmp_path / "data", STRATEGY="mirrored"
    )
    check_outputs(notebook)
    egm = EGM.load(tmp_path / "examples" / "example_images" / f"{dataset}.keras")
    assert egm.sample(2, seed=0).shape == ((2, 32, 32, 3) if dataset == "celeba" else (2, 28, 28, 3))
    assert ("modes covered" in texts(notebook, "text/markdown")) == (dataset == "stacked_mnist")
