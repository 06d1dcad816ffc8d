import json
import zipfile

import keras
import numpy as np
import pytest

import train_models
from utils import DATASETS, sample_2d_data


@pytest.fixture(scope="module")
def briefly_trained():
    """A run of a tenth of the usual length."""
    return train_models.train_egm("8gaussians", seed=0, epochs=10)


def test_a_short_run_beats_a_stated_quality(briefly_trained):
    # The limits are 1.3 times the worst of seeds 0 to 5 (0.019, 0.0018 nats, 0.139).
    row = train_models.measure("8gaussians", briefly_trained, rng=0, n_samples=500_000)
    assert row["density_tv"] < 0.025
    assert row["density_kl"] < 0.0025
    assert row["generator_tv_floor"] < 0.03
    assert row["generator_tv"] < 0.18
    assert row["smallest_mode_share"] > 0.06
    assert row == train_models.measure("8gaussians", briefly_trained, rng=0, n_samples=500_000)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_measurement_is_against_the_data_set_asked_for(briefly_trained, dataset):
    rows = []
    for sampler in (briefly_trained.sample, lambda n, seed: sample_2d_data(dataset, n, seed)):
        briefly_trained.sample = sampler
        rows.append(train_models.measure(dataset, briefly_trained, rng=0, n_samples=20_000))
    del briefly_trained.sample
    generated, perfect = rows
    assert np.isnan(generated["smallest_mode_share"]) == (dataset == "2spirals")
    assert perfect["generator_tv"] < 1.1 * perfect["generator_tv_floor"]
    if dataset != "8gaussians":
        assert generated["density_tv"] > 0.2
        assert generated["generator_tv"] > 0.2 + generated["generator_tv_floor"]


@pytest.mark.slow
def test_films_are_written_alone(tmp_path, capsys, monkeypatch):
    arguments = ["--gifs", "--dataset", "rings", "--epochs", "2", "--output-dir", str(tmp_path / "films")]
    monkeypatch.setattr("sys.argv", ["train_models.py", *arguments])
    train_models.main()
    assert {path.name for path in (tmp_path / "films").iterdir()} == {"den_real.gif", "den_fake.gif", "samples.gif"}
    assert "Epoch 1/2" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipe_is_a_function_of_the_seed():
    runs = [train_models.train_egm("rings", seed, epochs=1, steps_per_epoch=3) for seed in (1, 1, 2)]
    first, second, other = (run.sample(10, seed=0) for run in runs)
    np.testing.assert_array_equal(first, second)
    assert not np.isin(other, first).any()


def test_learning_rates_fall_to_zero(briefly_trained):
    for model in (briefly_trained, briefly_trained.dde_real, briefly_trained.dde_fake):
        np.testing.assert_allclose(model.optimizer.learning_rate, 0, atol=1e-9)


def read_config(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def test_a_file_without_optimizers_holds_the_model(briefly_trained, tmp_path):
    train_models.save_without_optimizers(briefly_trained, tmp_path / "small.keras")
    briefly_trained.save(tmp_path / "whole.keras")
    assert (tmp_path / "small.keras").stat().st_size < 0.5 * (tmp_path / "whole.keras").stat().st_size
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(loaded.sample(10, seed=0), briefly_trained.sample(10, seed=0))
    # The settings that old versions refuse are dropped from the file, and nothing else.
    loaded.save(tmp_path / "again.keras")
    before, after = (read_config(tmp_path / name) for name in ("again.keras", "small.keras"))
    names = ("quantization_config", "input_axes", "output_axes")
    assert not any(f'"{name}"' in json.dumps(after) for name in names)

    def drop(value):
        if isinstance(value, dict):
            return {key: drop(each) for key, each in value.items() if value[key] is not None or key not in names}
        return [drop(each) for each in value] if isinstance(value, list) else value

    assert before != after == drop(before)
    points = np.zeros((3, 2), np.float32)
    for noise_std in (0.1, 1.0):
        for name in ("dde_real", "dde_fake"):
            expected = getattr(briefly_trained, name)(points, noise_std=noise_std)
            for one, other in zip(getattr(loaded, name)(points, noise_std=noise_std), expected, strict=True):
                np.testing.assert_array_equal(one, other)


# --- The ready-trained models ---


@pytest.mark.parametrize(
    "dataset", [DATASETS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in DATASETS[1:])]
)
def test_ready_trained_models_meet_their_numbers(dataset):
    path = train_models.FOLDER / f"{dataset}.keras"
    assert path.stat().st_size < 1_000_000
    model = keras.saving.load_model(path)
    assert not model.compiled
    with zipfile.ZipFile(path) as archive:
        assert b"quantization_config" not in archive.read("config.json")
    row = train_models.measure(dataset, model, rng=0, n_samples=1_000_000)
    assert row["density_tv"] < 0.02
    assert row["density_kl"] < 0.002
    assert row["generator_tv"] < 0.08
    assert row["sliced_wasserstein_ratio"] < 1.7
    if dataset != "2spirals":
        shares = np.array([row["smallest_mode_share"], row["largest_mode_share"]])
        np.testing.assert_allclose(shares, 1 / (4 if dataset == "rings" else 8), rtol=0.1)
