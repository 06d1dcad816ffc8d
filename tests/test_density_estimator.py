"""The density of a table against closed forms, quadrature and finite differences, and what scikit-learn expects."""

import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import joblib
import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf
from scipy import stats
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from small_models import KEY, double_precision

from density_estimator import DensityEstimator, ReferenceDDE
from egm_dde.draws import split
from egm_dde.mixtures import (
    build_reference_net,
    draw,
    find_differences,
    find_shares,
    fit_in_subspace,
    kernel_log_densities,
    log_levels,
    make_fit,
    make_mixture,
    shrink,
)
from egm_dde.whitening import find_step
from energy_models import DDE
from tabular_data import KnownDensity

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[-1.0, 0.5, 0.0], [2.0, 0.0, 1.0]])
COVARIANCES = np.array(
    [[[1.0, 0.6, 0.0], [0.6, 0.5, 0.1], [0.0, 0.1, 0.4]], [[0.2, 0, 0], [0, 1.5, -0.3], [0, -0.3, 0.3]]]
)


def exact_log_density(points, noise_std):
    """Log density (n,) of the mixture above, with noise."""
    parts = zip(MEANS, COVARIANCES, strict=True)
    densities = [stats.multivariate_normal(m, c + noise_std**2 * np.eye(3)).logpdf(points) for m, c in parts]
    return logsumexp(np.reshape(densities, (2, -1)).T, b=WEIGHTS, axis=1)


def ring(n, seed=0):
    """A noisy ring (n, 2): a mixture has to patch it together."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, n)
    return 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.2 * rng.standard_normal((n, 2))


@keras.saving.register_keras_serializable("tests")
class OffsetDDE(ReferenceDDE):
    """A DDE whose constant is far from 0 outside of training, which would bring it to 0."""

    def log_ratio(self, y, noise_std, training=False):
        return super().log_ratio(y, noise_std, training) + (0.0 if training else 0.7)


@pytest.fixture(scope="module")
def fitted():
    """A density of the ring whose network has a share, and a constant that matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("density_estimator.ReferenceDDE", OffsetDDE)
        estimator = DensityEstimator(n_components=3, max_steps=60, random_state=0).fit(ring(300))
    assert 0.5 < estimator.log_normalizer_.value < 0.8
    assert 0 < estimator.network_share_ < 1
    estimator.network_share_ = 0.9  # the kernels would hide what the network says
    return estimator


# ---------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("noise_std", [0.0, 0.1, 2.0])
def test_the_density_of_a_noisy_mixture_is_exact(noise_std):
    points = np.random.default_rng(0).standard_normal((50, 3)) * 3
    mixture = make_mixture(WEIGHTS, MEANS, COVARIANCES)
    log_density = mixture(points, log_levels(points, noise_std))
    np.testing.assert_allclose(log_density[:, 0], exact_log_density(points, noise_std), rtol=1e-9)


def test_each_point_may_have_a_level_of_its_own():
    points, levels = np.random.default_rng(0).standard_normal((3, 3)), np.array([0.1, 0.5, 2.0])
    log_density = make_mixture(WEIGHTS, MEANS, COVARIANCES)(points, np.log(levels)[:, None])
    exact = [exact_log_density(points[i : i + 1], levels[i])[0] for i in range(3)]
    np.testing.assert_allclose(log_density[:, 0], exact, rtol=1e-9)


@pytest.mark.parametrize("noise_std", [0.0, 0.8])
def test_points_of_a_noisy_mixture_have_its_moments(noise_std):
    points = draw(make_mixture(WEIGHTS, MEANS, COVARIANCES), 100_000, noise_std, seed=1)
    mean = WEIGHTS @ MEANS
    within = np.einsum("k,kij->ij", WEIGHTS, COVARIANCES + noise_std**2 * np.eye(3))
    covariance = within + (MEANS - mean).T @ np.diag(WEIGHTS) @ (MEANS - mean)
    np.testing.assert_allclose(points.mean(axis=0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(points.T), covariance, atol=0.04)
    assert np.mean(points[:, 0] > 0.5) == pytest.approx(0.7, abs=0.12)


def test_kernel_densities_are_exact():
    x, y = np.random.default_rng(0).standard_normal((2, 20, 2))
    bandwidths = [0.2, 0.7]
    exact = [logsumexp([stats.norm(each, width).logpdf(y).sum(axis=1) for each in x], axis=0) for width in bandwidths]
    np.testing.assert_allclose(kernel_log_densities(x, y, bandwidths), np.array(exact) - math.log(20))


def test_covariances_are_drawn_to_their_mean_the_more_the_fewer_points_a_component_has():
    points, mean = (
        np.random.default_rng(0).standard_normal((50, 3)),
        WEIGHTS[0] * COVARIANCES[0] + WEIGHTS[1] * COVARIANCES[1],
    )
    np.testing.assert_allclose(
        make_fit(WEIGHTS, MEANS, COVARIANCES).score_samples(points), exact_log_density(points, 0.0)
    )
    np.testing.assert_array_equal(shrink(make_fit(WEIGHTS, MEANS, COVARIANCES), 0.0, 60).covariances_, COVARIANCES)
    np.testing.assert_allclose(shrink(make_fit(WEIGHTS, MEANS, COVARIANCES), math.inf, 60).covariances_, [mean, mean])
    shrunk = shrink(
        make_fit(WEIGHTS, MEANS, COVARIANCES), 2.0, 60
    )  # as if 2 d = 6 points of 18 + 6 and of 42 + 6 were of the mean
    np.testing.assert_allclose(shrunk.covariances_[0], (18 * COVARIANCES[0] + 6 * mean) / 24)
    np.testing.assert_allclose(shrunk.covariances_[1], (42 * COVARIANCES[1] + 6 * mean) / 48)
    exact = make_mixture(WEIGHTS, MEANS, shrunk.covariances_)(points, log_levels(points, 0.0))[:, 0]
    np.testing.assert_allclose(shrunk.score_samples(points), exact)


@pytest.mark.parametrize("of_covariance", [False, True])
def test_the_direction_in_which_components_differ_is_found(of_covariance):
    direction = np.array([0.6, 0.0, -0.8])
    means = np.outer([1.0, -2.0], [0.0, 1.0, 0.0] if of_covariance else 3 * direction)
    covariances = np.array([np.eye(3), np.eye(3) + 8 * of_covariance * np.outer(direction, direction)])
    assert abs(find_differences(make_fit(WEIGHTS, means, covariances))[:, 0] @ direction) == pytest.approx(1)


def test_across_its_subspace_a_mixture_is_standard_normal():
    x = np.random.default_rng(0).standard_normal((300, 3)) * [1, 1, 3] + [0, 0, 5]
    axes = np.array([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]]).T
    fit, along = fit_in_subspace(x, axes, 3, seed=0), GaussianMixture(3, random_state=0).fit(x @ axes)
    across = stats.norm.logpdf(x @ [0.8, 0.0, -0.6])
    np.testing.assert_allclose(fit.score_samples(x), along.score_samples(x @ axes) + across)


def test_the_share_is_the_most_likely_one():
    rng = np.random.default_rng(0)
    points = np.where(rng.random(5000) < 0.3, rng.normal(-1, 0.5, 5000), rng.normal(1, 1, 5000))
    log_p, log_q = stats.norm(-1, 0.5).logpdf(points), stats.norm(1, 1).logpdf(points)
    assert find_shares(np.array([log_p, log_q])) == pytest.approx([0.3, 0.7], abs=0.02)
    assert 0 < find_shares(np.array([log_q - 100, log_q]))[0] < 0.001


# ---------------------------------------------------------------------------------------------- the contrast


def make_dde():
    dde = ReferenceDDE(build_reference_net(make_mixture(WEIGHTS, MEANS, COVARIANCES), widths=(4,)), (0.1, 1.0), seed=0)
    rng = np.random.default_rng(0)
    for weight in dde.trainable_variables:
        weight.assign(rng.standard_normal(weight.shape) / 2)
    return dde


def test_the_contrast_is_its_formula():
    dde, x = make_dde(), np.float32(MEANS[[0, 1, 1]])
    key, reference_key = split(tf.constant(KEY))
    noisy_x, _, noise_std = dde.add_noise(tf.constant(x), key)
    reference_y = dde.net.get_layer("reference").sample(noise_std, reference_key)

    def correction(y):
        return dde.apply_net(y, tf.math.log(noise_std)) - dde.net.get_layer("reference")(y, tf.math.log(noise_std))

    contrast = np.log1p(np.exp(-correction(noisy_x))) + np.log1p(np.exp(correction(reference_y)))
    expected = DDE.denoising_loss(dde, tf.constant(x), key) + contrast.mean()
    assert float(dde.denoising_loss(tf.constant(x), KEY)) == pytest.approx(float(expected), rel=1e-4)


@double_precision()
def test_the_gradient_of_the_loss_agrees_with_finite_differences():
    dde, x = make_dde(), tf.constant(MEANS[[0, 1, 1]])
    with tf.GradientTape() as tape:
        loss = dde.denoising_loss(x, KEY)
    gradients = tape.gradient(loss, dde.trainable_variables)
    rng = np.random.default_rng(1)
    for weight, gradient in zip(dde.trainable_variables, gradients, strict=True):
        direction, value, losses = rng.standard_normal(weight.shape), weight.numpy(), []
        for step in (1e-5, -1e-5):
            weight.assign(value + step * direction)
            losses.append(float(dde.denoising_loss(x, KEY)))
        weight.assign(value)
        slope = float(tf.reduce_sum(gradient * direction))
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-7)


@double_precision()
def test_the_contrast_is_least_at_the_log_ratio_of_normalised_densities(monkeypatch):
    """Data N(0, 1), reference N(0.5, 2): the gradient with respect to a and b of a c + b is 0 at a = 1, b = 0."""
    net = build_reference_net(make_mixture([1.0], np.array([[0.5]]), [[[2.0]]]), widths=(4,))
    dde, x = ReferenceDDE(net, (0.1, 1.0), seed=0), tf.constant(np.random.default_rng(0).standard_normal((20_000, 1)))
    factor, offset = tf.Variable(1.0, dtype="float64"), tf.Variable(0.0, dtype="float64")

    def scaled(self, y, noise_std, training=False):
        variance, reference_variance = 1 + noise_std**2, 2 + noise_std**2
        exact = tf.math.log(reference_variance / variance) + (y - 0.5) ** 2 / reference_variance - y**2 / variance
        return factor * exact / 2 + offset

    monkeypatch.setattr(ReferenceDDE, "log_ratio", scaled)
    with tf.GradientTape() as tape:
        loss = dde.denoising_loss(x, KEY)
    np.testing.assert_allclose(tape.gradient(loss, [factor, offset]), 0.0, atol=0.01)


def test_the_untrained_density_is_the_reference_and_files_keep_it(tmp_path):
    net = build_reference_net(make_mixture(WEIGHTS, MEANS, COVARIANCES), widths=(4,))
    dde, points = ReferenceDDE(net, (0.1, 1.0), seed=0), np.float32(MEANS)
    np.testing.assert_allclose(dde.log_density(points, 0.5)[:, 0], exact_log_density(points, 0.5), rtol=1e-5)
    make_dde().save(tmp_path / "dde.keras")
    loaded = ReferenceDDE.load(tmp_path / "dde.keras")
    np.testing.assert_array_equal(loaded.log_density(points), make_dde().log_density(points))


# ---------------------------------------------------------------------------------------------- the estimator


def test_the_density_integrates_to_one_in_two_dimensions(fitted):
    axis = np.linspace(-7, 7, 281)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.exp(fitted.score_samples(points)).sum() * 0.05**2 == pytest.approx(1, abs=0.01)
    z = fitted.log_normalizer_
    assert fitted.log_normalizer_from_data_ == pytest.approx(z.value, abs=0.2)
    assert z.is_reliable and z.standard_error <= 0.01


def test_the_density_integrates_to_one_in_one_dimension():
    x = np.random.default_rng(0).exponential(size=(200, 1))
    estimator = DensityEstimator(max_steps=40, random_state=0).fit(x)
    points = np.linspace(-10, 20, 6001)[:, None]
    assert np.exp(estimator.score_samples(points)).sum() * 0.005 == pytest.approx(1, abs=0.01)


def test_the_network_learns_what_the_mixture_misses():
    x, test = ring(600), ring(2000, seed=1)
    options = {"n_components": 3, "random_state": 0}
    mixture = GaussianMixture(3, random_state=0).fit(x).score(test)
    assert DensityEstimator(max_steps=300, **options).fit(x).score(test) > mixture + 0.2


@pytest.mark.parametrize("kind", ["mixture", "banana"])
def test_a_curved_ridge_or_clusters_in_many_dimensions_cost_hardly_more_than_their_covariance(kind):
    known, rng = KnownDensity(kind, 24, 0), np.random.default_rng(1)
    x, test = known.sample(4000, rng), known.sample(20_000, rng)
    error = DensityEstimator(max_steps=0, random_state=0).fit(x).score(test) - known.log_density(test).mean()
    assert -0.12 < error < 0.02  # 24 * 27 / 2 numbers of the mean and the covariance cost 0.04


def test_a_row_far_from_all_others_has_a_density_that_is_small_but_not_absurd():
    x = np.random.default_rng(0).standard_normal((200, 2))
    estimator = DensityEstimator(max_steps=0, random_state=0).fit(x)
    far = [[100.0, 0.0], [1000.0, 0.0], [0.0, 2000.0]]
    assert (estimator.score_samples(far) > -40).all()  # a Gaussian has minus 5000 and less
    exact = stats.norm.logpdf(x).sum(axis=1)
    assert (estimator.score_samples(x) - exact).mean() > -0.01


@pytest.mark.parametrize("max_steps", [0, 20])
def test_units_change_the_density_by_their_determinant(max_steps):
    x, matrix = ring(100), np.array([[1000.0, 0.0], [0.0, 0.01]])
    options = {"n_components": 2, "max_steps": max_steps, "random_state": 0}
    scores = DensityEstimator(**options).fit(x).score_samples(x)
    other = DensityEstimator(**options).fit(x @ matrix + 1e3).score_samples(x @ matrix + 1e3)
    np.testing.assert_allclose(other, scores - np.log(np.linalg.det(matrix)), atol=1e-3)


def test_the_gradient_agrees_with_finite_differences(fitted):
    x, step = ring(5, seed=2), 1e-3
    for column in range(2):
        ahead, behind = (fitted.score_samples(x + sign * step * np.eye(2)[column]) for sign in (1, -1))
        gradient = fitted.score_gradient(x)[:, column]
        np.testing.assert_allclose(gradient, (ahead - behind) / (2 * step), rtol=0.01, atol=0.01)


def test_samples_follow_the_density(fitted):
    """Where log densities are as large as at samples, on average, as the integral of p log p says."""
    x = fitted.sample(5000, random_state=0)
    np.testing.assert_array_equal(x, fitted.sample(5000, random_state=0))
    axis = np.linspace(-7, 7, 281)
    log_p = fitted.score_samples(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    assert fitted.score(x) == pytest.approx((np.exp(log_p) * log_p).sum() * 0.05**2, abs=0.06)


def test_files_keep_the_density(fitted, tmp_path):
    x = ring(10)
    joblib.dump(fitted, tmp_path / "density.joblib")
    for loaded in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "density.joblib")):
        np.testing.assert_array_equal(loaded.score_samples(x), fitted.score_samples(x))


def test_it_is_a_part_of_scikit_learn():
    estimator = DensityEstimator(n_components=1, max_steps=0, random_state=0)
    scores = cross_val_score(make_pipeline(StandardScaler(), clone(estimator)), ring(50), cv=3)
    assert np.isfinite(scores).all()


def test_validation_data_choose():
    """Rows to choose by that are new favour the Gaussian that all come from; the same rows, kernels on themselves."""
    x, others = np.random.default_rng(0).standard_normal((2, 100, 2))
    estimator = DensityEstimator(n_components=1, max_steps=0, random_state=0)
    assert estimator.fit(x, validation_data=x).kernel_share_ > 0.9
    assert estimator.fit(x, validation_data=others).kernel_share_ < 0.5
    with pytest.raises(ValueError, match="features"):
        estimator.fit(x, validation_data=x[:, :1])


def test_progress_is_shown(monkeypatch):
    bar = Mock(wraps=keras.callbacks.Callback)
    monkeypatch.setattr("egm_dde.visualization.ProgressBar", bar)
    DensityEstimator(n_components=1, max_steps=20, random_state=0, verbose=True).fit(ring(50))
    assert bar.called


def test_matplotlib_stays_out():
    """It is the extra ``pictures`` of the package."""
    program = "import sys, density_estimator; assert 'egm_dde.visualization' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


# ---------------------------------------------------------------------------------------------- tables of all kinds


def test_constant_columns_are_left_out_by_name():
    x = ring(60)
    with pytest.warns(UserWarning, match="constant columns are left out of the density: 1"):
        estimator = DensityEstimator(max_steps=0, random_state=0).fit(np.insert(x, 1, 7.0, axis=1))
    expected = DensityEstimator(max_steps=0, random_state=0).fit(x).score_samples(x)
    np.testing.assert_allclose(estimator.score_samples(np.insert(x, 1, 7.0, axis=1)), expected)
    assert (estimator.sample(5)[:, 1] == 7).all()
    assert (estimator.score_gradient(np.insert(x, 1, 7.0, axis=1))[:, 1] == 0).all()


def test_a_data_frame_gives_the_names_of_its_columns():
    frame = pandas.DataFrame(ring(60), columns=["width", "height"]).assign(kind=1.0)
    estimator = DensityEstimator(max_steps=0, random_state=0)
    with pytest.warns(UserWarning, match="constant columns are left out of the density: kind"):
        scores = estimator.fit(frame).score_samples(frame)
    with pytest.warns(UserWarning, match="constant columns are left out of the density: 2"):
        expected = clone(estimator).fit(frame.to_numpy()).score_samples(frame.to_numpy())
    np.testing.assert_array_equal(scores, expected)
    with pytest.raises(ValueError, match="feature names"):
        estimator.score_samples(frame[["height", "width", "kind"]])


def test_steps_of_one_size_are_named():
    with pytest.warns(UserWarning, match=r"steps of one size, 0 \(0.5\), 1 \(0.5\): .* add uniform noise"):
        DensityEstimator(n_components=1, max_steps=0).fit(np.round(2 * ring(200)) / 2)
    assert find_step(np.tile([0.1, 0.2, 0.5], 5)) == pytest.approx(0.1)
    assert find_step(np.tile([0.1, 0.2, 0.55], 5)) is None
    assert find_step(np.arange(20.0)) is None


@pytest.mark.parametrize("rows, columns", [(3, 1), (10, 2), (15, 30), (60, 1)])
def test_tables_of_any_shape_have_a_density(rows, columns):
    x = np.random.default_rng(0).standard_normal((rows, columns))
    estimator = DensityEstimator(max_steps=20, random_state=0).fit(x)
    assert np.isfinite(estimator.score_samples(x)).all()
    assert estimator.sample(3, random_state=0).shape == (3, columns)


def test_repeated_rows_and_columns_have_a_density():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        repeated = DensityEstimator(max_steps=20, random_state=0).fit(np.repeat(ring(40), 3, axis=0))
    assert np.isfinite(repeated.score_samples(ring(5))).all()
    with pytest.warns(UserWarning, match="some columns follow from others"):
        DensityEstimator(max_steps=0, random_state=0).fit(np.repeat(ring(40), 2, axis=1))


@pytest.mark.parametrize(
    "options, x, message",
    [
        ({}, np.array([[1.0], [np.nan], [2.0]]), "NaN"),
        ({}, np.ones((5, 2)), "rows that differ, got 5 alike"),
        ({"n_components": 0}, ring(9), 'n_components, unless it is "auto", must be an integer of at least 1, got 0'),
        ({"max_steps": -1}, ring(9), 'max_steps, unless it is "auto", must be an integer of at least 0, got -1'),
        ({"n_components": 9}, ring(9), "n_components"),
    ],
)
def test_what_has_no_density_is_refused(options, x, message):
    with pytest.raises(ValueError, match=message):
        DensityEstimator(**options).fit(x)


@pytest.mark.slow
@parametrize_with_checks([DensityEstimator(n_components=1, max_steps=20, random_state=0)])
def test_scikit_learn_accepts_the_estimator(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tables without a density
        check(estimator)
