import keras
import numpy as np
import pytest

from egm_dde import evaluation
import train_models
from utils import DATASETS


@pytest.fixture(scope="module")
def briefly_trained():
    """A run of a tenth of the usual length."""
    return train_models.train_egm("8gaussians", seed=0, epochs=10)


def test_a_short_run_beats_a_stated_quality(briefly_trained):
    # The limits are 1.3 times the worst of seeds 0 to 5 (0.019, 0.0018 nats, 0.139).
    density = evaluation.density_metrics(briefly_trained.dde_real.log_density, "8gaussians", 0.1)
    assert density.total_variation < 0.025
    assert density.kl_divergence < 0.0025
    samples = briefly_trained.sample(500_000, seed=0)
    generated = evaluation.sample_metrics(samples, "8gaussians", 0.1, rng=0).total_variation
    assert generated.floor < 0.03
    assert generated.value < 0.18
    assert evaluation.mode_coverage(samples, "8gaussians") == 1


def test_the_recipe_is_a_function_of_the_seed():
    runs = [train_models.train_egm("rings", seed, epochs=1, steps_per_epoch=3) for seed in (1, 1, 2)]
    first, second, other = (run.sample(10, seed=0) for run in runs)
    np.testing.assert_array_equal(first, second)
    assert not np.isin(other, first).any()


def test_learning_rates_fall_to_zero(briefly_trained):
    for optimizer in (briefly_trained.dde_real_optimizer, briefly_trained.gen_optimizer):
        np.testing.assert_allclose(optimizer.learning_rate, 0, atol=1e-9)


def test_a_file_without_optimizers_holds_the_model(briefly_trained, tmp_path):
    train_models.save_without_optimizers(briefly_trained, tmp_path / "small.keras")
    briefly_trained.save(tmp_path / "whole.keras")
    assert (tmp_path / "small.keras").stat().st_size < 0.5 * (tmp_path / "whole.keras").stat().st_size
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(loaded.sample(10, seed=0), briefly_trained.sample(10, seed=0))
    points = np.zeros((3, 2), np.float32)
    for noise_std in (0.1, 1.0):
        for name in ("dde_real", "dde_fake"):
            expected = getattr(briefly_trained, name)(points, noise_std=noise_std)
            for one, other in zip(getattr(loaded, name)(points, noise_std=noise_std), expected, strict=True):
                np.testing.assert_array_equal(one, other)


# --- The ready-trained models ---


@pytest.mark.parametrize("dataset", DATASETS)
def test_ready_trained_models_meet_their_numbers(dataset):
    path = train_models.FOLDER / f"{dataset}.keras"
    assert path.stat().st_size < 1_000_000
    model = keras.saving.load_model(path)
    assert not model.compiled
    density = evaluation.density_metrics(model.dde_real.log_density, dataset, 0.1)
    assert density.total_variation < 0.02
    assert density.kl_divergence < 0.002
    samples = model.sample(1_000_000, seed=1)
    generated = evaluation.sample_metrics(samples, dataset, 0.1, rng=0).total_variation
    assert generated.value < 0.08
    distance = evaluation.sliced_wasserstein_to_data(samples, dataset, rng=0)
    assert distance.value < 1.7 * distance.floor
    if dataset != "2spirals":
        shares = evaluation.mode_shares(samples, dataset)
        np.testing.assert_allclose(shares, 1 / len(shares), rtol=0.1)
