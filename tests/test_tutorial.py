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
from energy_models import EGM

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "egm_dde.ipynb"
FILMS = ("den_real.gif", "den_fake.gif", "samples.gif", "method.gif", "levels.gif")
EMBEDDED = ("method.gif", "levels.gif")


@pytest.fixture(scope="module")
def kept():
    return nbformat.read(NOTEBOOK, as_version=4)


def copy_modules(folder):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("egm_dde/*.py"), *ROOT.glob("examples/*.py")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))


def execute_copy(folder, path, change=("", ""), **settings):
    """Execute a notebook, with settings and one change of its text, in a copy of the project; return it."""
    copy_modules(folder)
    copy = folder / path.relative_to(ROOT)
    copy.write_text(path.read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    with pytest.MonkeyPatch.context() as environment:
        for setting, value in settings.items():
            environment.setenv(setting, str(value))
        assert execute([str(copy)]) == 0
    return nbformat.read(copy, as_version=4)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A folder in which the notebook was executed with two epochs, and the notebook."""
    folder = tmp_path_factory.mktemp("tutorial")
    return folder, execute_copy(folder, NOTEBOOK, EPOCHS=2, SEED=3, DATASET="rings", OUTPUT_DIR="rings_images")


@pytest.fixture(scope="module")
def trained(short_run):
    return EGM.load(short_run[0] / "rings_images" / "egm.keras")


def text_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


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
    assert frames.shape[2] >= 480 and path.stat().st_size < 1_000_000
    assert all(np.abs(frame.astype(int) - following).max() > 0 for frame, following in itertools.pairwise(frames))


def films_within(html):
    """The GIFs that are embedded in a page."""
    return [base64.b64decode(film) for film in re.findall(r'src="data:image/gif;base64,([A-Za-z0-9+/=]+)"', html)]


def test_kept_notebook_is_one_clean_run(kept):
    assert NOTEBOOK.stat().st_size < 5_000_000
    check_outputs(kept)


def test_kept_films_are_whole_and_shown_as_a_page(kept):
    films = [ROOT / "example_images" / name for name in FILMS]
    for film in films:
        check_gif(film, 12 if film.name == "levels.gif" else 40)
    page, _ = HTMLExporter().from_notebook_node(kept)
    assert films_within(page) == [film.read_bytes() for film in films if film.name in EMBEDDED]
    assert 'src="example_images/samples.gif"' in page  # the first thing seen


def test_style(kept):
    assert len(re.findall(r"^# ", text_of(kept), flags=re.MULTILINE)) == 1
    lengths = [num_lines(cell) for cell in code_cells(kept)]
    assert max(lengths) <= 40
    assert statistics.median(lengths) <= 9
    assert len(text_of(kept).split()) <= 3000
    # Text before every code cell; one folded cell before the first picture.
    kinds = [cell.cell_type for cell in kept.cells]
    assert not [index for index, pair in enumerate(itertools.pairwise(kinds)) if pair == ("code", "code")]
    setup, picture = code_cells(kept)[:2]
    assert setup.metadata["jupyter"]["source_hidden"] and num_lines(setup) <= 12
    assert "plot_samples" in picture.source


def test_sections_come_in_order(kept):
    headings = re.findall(r"^## (.*)$", text_of(kept), flags=re.MULTILINE)
    sections = "data, fifteen lines, noise levels, generator between, Results, wrong, related, next".split(", ")
    places = [next(i for i, heading in enumerate(headings) if words in heading) for words in sections]
    assert places == sorted(places)


def test_the_method_from_scratch_is_short(kept):
    """A density estimator in 15 lines, with its loop; the loop of the generator in 20."""
    from_scratch = [num_lines(cell) for cell in code_cells(kept) if "@tf.function" in cell.source]
    assert len(from_scratch) == 2
    assert from_scratch[0] <= 15 + 2 and from_scratch[1] <= 20  # the noise level and the optimizer


def test_one_parameters_cell(kept):
    (tagged,) = [cell for cell in code_cells(kept) if "parameters" in cell.metadata.get("tags", [])]
    names = [target.id for node in ast.parse(tagged.source).body for target in node.targets]
    assert names == ["DATASET", "SEED", "EPOCHS", "OUTPUT_DIR"]


@pytest.mark.slow
def test_short_run_is_clean_and_writes_gifs_and_model(short_run):
    folder, notebook = short_run
    check_outputs(notebook)
    assert len(films_within(str(code_cells(notebook)))) == len(EMBEDDED)
    assert {path.name for path in (folder / "rings_images").iterdir()} == {*FILMS, "egm.keras"}
    assert not (folder / "example_images").exists()
    for name in FILMS:
        check_gif(folder / "rings_images" / name, 10)


@pytest.mark.slow
def test_model_of_the_short_run_samples(trained):
    samples = trained.sample(100, seed=0)
    assert samples.shape == (100, 2)
    assert np.isfinite(samples).all()
    assert trained.num_steps == 100
    log_density, score = trained.dde_real(samples)
    assert log_density.shape == (100, 1)
    assert score.shape == (100, 2)


@pytest.mark.slow
def test_the_notebook_and_the_ready_trained_models_have_one_recipe(trained, kept):
    import train_models

    recipe = train_models.build_egm(seed=3, epochs=2)
    assert without_names(trained.get_config()) == without_names(recipe.get_config())
    assert without_names(trained.get_compile_config()) == without_names(recipe.get_compile_config())
    source = "\n".join(cell.source for cell in code_cells(kept))
    sizes = train_models.BATCH_SIZE, train_models.NUM_BATCHES, train_models.STEPS_PER_EPOCH
    assert f'os.environ.get("EPOCHS", "{train_models.EPOCHS}")' in source
    assert "BATCH_SIZE, NUM_BATCHES, STEPS_PER_EPOCH = {}, {}, {}".format(*sizes) in source


def without_names(config):
    """Drop the names of networks and layers, which Keras numbers through."""
    if isinstance(config, dict):
        dropped = {"name", "module", "registered_name", "input_layers", "output_layers", "inbound_nodes"}
        return {key: without_names(value) for key, value in config.items() if key not in dropped}
    if isinstance(config, (list, tuple)):
        return [without_names(value) for value in config]
    return config
