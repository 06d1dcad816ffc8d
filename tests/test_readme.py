"""The README's snippet runs as printed and does what it says."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow as tf

from egm_dde.evaluation import density_metrics, mode_shares
from utils import distances_to_modes, noisy_density_2d, sample_2d_data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_snippet(index):
    """Run one of the README's Python blocks; return what it defines."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    assert len([line for line in blocks[index].splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(blocks[index], "README.md", "exec"), names)
    return names


def test_snippet_trains_a_density_estimator():
    names = run_snippet(0)
    assert names["log_density"].shape == (5, 1)
    assert names["score"].shape == (5, 2)
    assert np.isfinite(names["log_density"]).all()
    # The exact minimum is 0.7822, a network that learned nothing has 1.
    fresh = sample_2d_data("2spirals", 100_000, rng=1)
    assert 0.77 < names["dde"].evaluate(fresh, batch_size=10_000, verbose=0) < 0.80
    exact_density = partial(noisy_density_2d, "2spirals", noise_std=0.1)
    # One noise level leaves the relative weights of the arms loose; the base measure alone is at 0.47.
    assert density_metrics(names["dde"].log_density, exact_density).total_variation < 0.25


def test_snippet_samples_a_ready_trained_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run_snippet(1)
    assert names["points"].shape == (1000, 2)
    assert names["log_density"].shape == (1000, 1)
    assert mode_shares(distances_to_modes("rings", names["points"])).min() > 0.2


def test_snippet_trains_saves_and_serves(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dde = run_snippet(2)["dde"]
    x = sample_2d_data("rings", 5, rng=0)
    served = tf.saved_model.load("served")
    for given, expected in zip(served.serve(x), type(dde).load("dde.keras")(x), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


def test_links_to_files_exist():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert "example_images/samples.gif" in targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_modules_named_exist():
    named = set(re.findall(r"`(\w+\.(?:py|ipynb|txt))`", README))
    assert {"energy_models.py", "utils.py", "evaluation.py", "visualization.py"} <= named
    assert not [name for name in named if not (ROOT / name).exists() and not (ROOT / "egm_dde" / name).exists()]
