"""What pip installs: the method and the machinery, usable without this folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Trained, saved and loaded where nothing but the installed files is on the path.
PROGRAM = """
import importlib.util
import pathlib
import sys

import numpy as np

import egm_dde.evaluation
import egm_dde.sampling
import egm_dde.visualization
import energy_models
from energy_models import DDE, build_energy_net

folder = pathlib.Path(sys.argv[1])
assert folder in pathlib.Path(energy_models.__file__).parents
assert importlib.util.find_spec("utils") is None
dde = DDE(build_energy_net(widths=(8,), num_features=4), noise_std=0.5, seed=0)
dde.compile("adam")
points = np.random.default_rng(0).standard_normal((64, 2)).astype("float32")
assert np.isfinite(dde.fit(points, epochs=2, verbose=0).history["loss"]).all()
dde.save("dde.keras")
loaded = DDE.load("dde.keras")
np.testing.assert_array_equal(loaded.log_density(points), dde.log_density(points))
"""


def run(*arguments, **options):
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: the build leaves nothing in the project."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE", *ROOT.glob("requirements*.txt"), *ROOT.glob("*.py")):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "egm_dde", source / "egm_dde", ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (path,) = folder.iterdir()
    return path


def test_the_wheel_has_the_method_and_the_machinery_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    modules = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert modules == {"density_estimator.py", "energy_models.py", "egm_dde"}
    files = {path.name for path in (ROOT / "egm_dde").glob("*.py")}
    assert {name.split("/")[1] for name in names if name.startswith("egm_dde/")} == files
    needed = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    assert {name.split("<")[0] for name in needed} == {
        *("tensorflow", "keras", "numpy", "scipy", "matplotlib", "imageio", "pillow", "scikit-learn", "threadpoolctl")
    }


def test_the_installed_package_trains_saves_and_loads(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "-q", "--no-deps", "--target", installed, wheel)
    (elsewhere / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run("program.py", installed, cwd=elsewhere, env=environment)
