"""The snippets of the README and its pages run as printed and do what they say."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from sklearn.mixture import GaussianMixture

from egm_dde.evaluation import density_metrics, minimum_denoising_loss, mode_shares, sample_metrics
from utils import distances_to_modes, noisy_density_2d, sample_2d_data

ROOT = Path(__file__).parent.parent
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/keras.md")}


def run_snippet(index, page="README.md"):
    """Run one of a page's Python blocks; return what it defines."""
    block = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)[index]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(block, page, "exec"), names)
    return names


def test_snippet_trains_a_generator_and_draws_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    egm = run_snippet(0)["egm"]
    assert (tmp_path / "spirals.png").stat().st_size > 10_000
    exact_density = partial(noisy_density_2d, "2spirals", noise_std=0.1)
    log_density = partial(egm.dde_real.log_density, noise_std=0.1)
    samples = egm.sample(100_000, seed=0), exact_density, partial(sample_2d_data, "2spirals")
    # The Gaussians that both start as are at 0.5 to 0.6.
    assert density_metrics(log_density, exact_density).total_variation < 0.25
    assert sample_metrics(*samples, 0.1, rng=0).total_variation.value < 0.25


def test_snippet_samples_a_ready_trained_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run_snippet(1)
    assert names["log_density"].shape == (1000, 1)
    assert mode_shares(distances_to_modes("rings", names["points"])).min() > 0.2


def test_snippet_estimates_the_density_of_data_in_any_units(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", 500 + 30 * sample_2d_data("2spirals", 20_000, rng=0))
    names = run_snippet(2)
    noise_std = names["dde"].noise_std / 30
    assert names["log_density"].shape == (5, 1)
    minimum = minimum_denoising_loss(partial(noisy_density_2d, "2spirals", noise_std=noise_std), noise_std)
    fresh = 500 + 30 * sample_2d_data("2spirals", 10_000, rng=1)
    # A network that has learned nothing has a loss of 1.
    assert names["dde"].evaluate(fresh, batch_size=10_000, verbose=0) < (1 + minimum) / 2


def test_snippet_estimates_the_density_of_a_table():
    names = run_snippet(3)
    one_gaussian = GaussianMixture().fit(names["x"]).score(names["x"])
    assert names["log_densities"].shape == (178,)
    assert names["log_densities"].mean() > one_gaussian


def test_snippet_trains_saves_and_serves(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dde = run_snippet(0, "docs/keras.md")["dde"]
    x = sample_2d_data("rings", 5, rng=0)
    served = tf.saved_model.load("served")
    for given, expected in zip(served.serve(x), type(dde).load("dde.keras")(x), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["README.md", "docs/differences.md", "docs/keras.md", "benchmarks/README.md"])
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    targets = re.findall(r'\]\((?!https?:)([^)]+)\)|<img src="([^"]+)"', text)
    for file, _, heading in (max(target).partition("#") for target in targets):
        linked = (ROOT / path).parent / file if file else ROOT / path
        assert linked.exists(), file
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
