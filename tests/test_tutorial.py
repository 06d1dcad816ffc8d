"""The tutorial notebook: its kept state, its style, and a short run of it in a folder of its own."""

import ast
import base64
import itertools
import re
import shutil
import statistics
from pathlib import Path

import imageio.v3 as iio
import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter

from egm_dde.notebook import main as execute

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "egm_dde.ipynb"
GIFS = ("den_real.gif", "den_fake.gif", "samples.gif")
FILMS = (*GIFS, "levels.gif")
MODULES = ("energy_models.py", "train_models.py", "utils.py")


@pytest.fixture(scope="module")
def kept():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A folder in which the notebook was executed with two epochs."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in (NOTEBOOK.name, *MODULES):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "egm_dde", folder / "egm_dde")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("EPOCHS", "2")
        environment.setenv("SEED", "3")
        environment.setenv("DATASET", "rings")
        environment.setenv("OUTPUT_DIR", "rings_images")
        assert execute([str(folder / NOTEBOOK.name)]) == 0
    return folder


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def num_lines(cell):
    return len([line for line in cell.source.splitlines() if line.strip()])


def check_outputs(notebook):
    """Execution counts are 1..n, nothing went to stderr, and nothing reads like a warning or an error."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"warning|error|traceback", text, flags=re.IGNORECASE), text


def check_gif(path, fewest_frames):
    frames = iio.imread(path)
    assert len(frames) >= fewest_frames
    metadata = [iio.immeta(path, index=index) for index in range(len(frames))]
    assert metadata[-1]["duration"] == 1500
    assert metadata[0]["loop"] == 0
    assert path.stat().st_size < 600_000
    assert all(np.abs(frame.astype(int) - following).max() > 0 for frame, following in itertools.pairwise(frames))


def films_within(html):
    """The GIFs that are embedded in a page."""
    return [base64.b64decode(film) for film in re.findall(r'src="data:image/gif;base64,([A-Za-z0-9+/=]+)"', html)]


def test_kept_notebook_is_one_clean_run(kept):
    assert NOTEBOOK.stat().st_size < 3_000_000
    check_outputs(kept)


def test_kept_gifs():
    for name in FILMS:
        check_gif(ROOT / "example_images" / name, 12 if name == "levels.gif" else 35)


def test_kept_notebook_shows_its_films_as_a_page(kept):
    page, _ = HTMLExporter().from_notebook_node(kept)
    assert films_within(page) == [(ROOT / "example_images" / name).read_bytes() for name in FILMS]


def test_style(kept):
    text = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1
    lengths = [num_lines(cell) for cell in code_cells(kept)]
    assert max(lengths) <= 30
    assert statistics.median(lengths) <= 10
    # Text before every code cell.
    kinds = [cell.cell_type for cell in kept.cells]
    assert not [index for index, pair in enumerate(itertools.pairwise(kinds)) if pair == ("code", "code")]
    assert kinds[0] == "markdown"


def test_sections_come_in_order(kept):
    text = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    wanted = [
        "Setup",
        "data",
        "fifteen lines",
        "noise levels",
        "generator between",
        "Results",
        "wrong",
        "related",
        "next",
    ]
    places = [next(i for i, heading in enumerate(headings) if word in heading) for word in wanted]
    assert places == sorted(places)


def test_the_method_from_scratch_is_short(kept):
    """A density estimator in 15 lines, with its loop; the loop of the generator in 20."""
    from_scratch = [num_lines(cell) for cell in code_cells(kept) if "@tf.function" in cell.source]
    assert len(from_scratch) == 2
    assert from_scratch[0] <= 15 + 2  # the network and its optimizer
    assert from_scratch[1] <= 20


def test_one_parameters_cell(kept):
    tagged = [cell for cell in code_cells(kept) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = [target.id for node in ast.parse(tagged[0].source).body for target in node.targets]
    assert names == ["DATASET", "SEED", "EPOCHS", "OUTPUT_DIR"]


def test_imports_are_in_the_setup_cells(kept):
    importing = [cell for cell in code_cells(kept) if re.search(r"^(import|from) ", cell.source, flags=re.MULTILINE)]
    assert importing == code_cells(kept)[:2]


@pytest.mark.slow
def test_short_run_is_clean(short_run):
    notebook = nbformat.read(short_run / NOTEBOOK.name, as_version=4)
    check_outputs(notebook)
    films = films_within(str(code_cells(notebook)))
    assert len(films) == len(FILMS)


@pytest.mark.slow
def test_short_run_writes_gifs_and_model(short_run):
    written = {path.name for path in (short_run / "rings_images").iterdir()}
    assert written == {*FILMS, "egm.keras"}
    assert not (short_run / "example_images").exists()
    for name in FILMS:
        check_gif(short_run / "rings_images" / name, 10)


@pytest.mark.slow
def test_model_of_the_short_run_loads(short_run):
    import keras

    import energy_models  # noqa: F401  registers the classes

    egm = keras.saving.load_model(short_run / "rings_images" / "egm.keras")
    samples = egm.sample(100, seed=0)
    assert samples.shape == (100, 2)
    assert np.isfinite(samples).all()
    assert egm.num_steps == 100
    log_density, score = egm.dde_real(samples)
    assert log_density.shape == (100, 1)
    assert score.shape == (100, 2)


@pytest.mark.slow
def test_the_notebook_and_the_ready_trained_models_have_one_recipe(short_run):
    import keras

    import train_models

    trained = keras.saving.load_model(short_run / "rings_images" / "egm.keras")
    recipe = train_models.build_egm(seed=3, epochs=2)
    assert without_names(trained.get_config()) == without_names(recipe.get_config())
    assert without_names(trained.get_compile_config()) == without_names(recipe.get_compile_config())
    kept = nbformat.read(NOTEBOOK, as_version=4)
    source = "\n".join(cell.source for cell in code_cells(kept))
    for line in (
        f'os.environ.get("EPOCHS", "{train_models.EPOCHS}")',
        "BATCH_SIZE, NUM_BATCHES, STEPS_PER_EPOCH = "
        f"{train_models.BATCH_SIZE}, {train_models.NUM_BATCHES}, {train_models.STEPS_PER_EPOCH}",
    ):
        assert line in source


def without_names(config):
    """Drop the names of networks and layers, which Keras numbers through."""
    if isinstance(config, dict):
        dropped = {"name", "module", "registered_name", "input_layers", "output_layers", "inbound_nodes"}
        return {key: without_names(value) for key, value in config.items() if key not in dropped}
    if isinstance(config, (list, tuple)):
        return [without_names(value) for value in config]
    return config
