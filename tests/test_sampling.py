"""Points and constants against closed forms: the networks are exact log densities, with an offset that is known."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from scipy.special import logsumexp
from small_models import double_precision

from egm_dde import sampling
from egm_dde.evaluation import mode_shares
from egm_dde.sampling import annealed_langevin, correct, langevin, log_partition
from energy_models import DDE, EGM, build_energy_net
from utils import GAUSSIAN_CENTRES, GAUSSIAN_STD, distances_to_modes, sample_2d_data

OFFSET = -12.5


@keras.saving.register_keras_serializable("test_sampling")
class ExactLogDensity(keras.layers.Layer):
    """Log density of a mixture of Gaussians of equal covariance plus noise, plus an offset; then it may be bent.

    A bend replaces the coordinate x_2 by x_2 + bend * (x_1^2 - 1), which does not change volumes.
    """

    def __init__(self, means, covariance, weights=None, offset=OFFSET, bend=0.0):
        super().__init__(autocast=False)
        self.means, self.covariance = np.array(means, dtype=float), np.array(covariance, dtype=float)
        self.shares = np.full(len(means), 1 / len(means)) if weights is None else np.array(weights)
        self.offset, self.bend = offset, bend

    def call(self, x, log_noise_std):
        variances, axes = np.linalg.eigh(self.covariance)
        x = tf.reshape(x, (-1, len(variances)))
        if self.bend:
            x = tf.concat([x[:, :1], x[:, 1:2] + self.bend * (x[:, :1] ** 2 - 1), x[:, 2:]], axis=1)
        variances = tf.cast(variances, x.dtype) + tf.exp(2 * log_noise_std)  # (n, d)
        differences = tf.matmul(x, tf.cast(axes, x.dtype))[:, None] - tf.cast(self.means @ axes, x.dtype)  # (n, k, d)
        exponents = -tf.reduce_sum(tf.square(differences) / variances[:, None], axis=2) / 2
        log_norm = tf.reduce_sum(tf.math.log(2 * math.pi * variances), axis=1, keepdims=True) / 2
        log_weights = tf.cast(np.log(self.shares), x.dtype)
        return tf.reduce_logsumexp(exponents + log_weights, axis=1, keepdims=True) - log_norm + self.offset


def exact_dde(noise_std, means, covariance, event_shape=None, **options):
    layer = ExactLogDensity(means, covariance, **options)
    x = keras.Input(event_shape or (len(covariance),))
    if isinstance(noise_std, tuple):
        log_noise_std = keras.Input((1,))
        net = keras.Model([x, log_noise_std], layer(x, log_noise_std))
    else:
        log_noise_std = keras.layers.Rescaling(0.0, math.log(noise_std))(keras.layers.Flatten()(x)[:, :1])
        net = keras.Model(x, layer(x, log_noise_std))
    return DDE(net, noise_std, seed=0)


def exact_8gaussians(noise_std=(0.1, 1.5), **options):
    return exact_dde(noise_std, GAUSSIAN_CENTRES, GAUSSIAN_STD**2 * np.eye(2), **options)


def rotation(dim, seed=0):
    return stats.ortho_group(dim, seed).rvs() if dim > 1 else np.eye(1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def assert_gaussian(x, mean, variance, sigmas=4.5):
    """Check mean and variance of independent normal columns (n, d), to so many standard errors."""
    mean, variance = np.broadcast_to(mean, x.shape[1]), np.broadcast_to(variance, x.shape[1])
    np.testing.assert_array_less(np.abs(x.mean(axis=0) - mean), sigmas * np.sqrt(variance / len(x)))
    np.testing.assert_array_less(np.abs(x.var(axis=0) / variance - 1), sigmas * np.sqrt(2 / len(x)))


# --- Langevin dynamics at one level ---

VARIANCES, LEVEL = np.array([0.1, 0.5, 2.0]), 0.6
AXES = rotation(3)
MEAN = np.array([0.5, -1.0, 2.0])


@pytest.mark.parametrize("noise_std", [LEVEL, (0.2, 1.6)])
@pytest.mark.parametrize("num_steps", [1, 4, 60])
def test_langevin_has_the_moments_of_its_recursion_on_a_correlated_gaussian(noise_std, num_steps):
    dde = exact_dde(noise_std, [MEAN], AXES * VARIANCES @ AXES.T)
    step_size, noisy = 0.2, VARIANCES + LEVEL**2
    x = langevin(dde, np.zeros((60_000, 3), np.float32), num_steps, step_size, noise_std=LEVEL, seed=1)
    # Along an axis of variance v, a step multiplies the distance from the mean by 1 - h / v and adds 2 h.
    decay = (1 - step_size / noisy) ** num_steps
    biased = noisy / (1 - step_size / (2 * noisy))
    assert_gaussian(x @ AXES, (1 - decay) * (MEAN @ AXES), (1 - decay**2) * biased)
    correlations = np.corrcoef(x @ AXES, rowvar=False)[np.triu_indices(3, 1)]
    np.testing.assert_array_less(np.abs(correlations), 4.5 / np.sqrt(len(x)))


@pytest.mark.parametrize("adjusted", [False, True])
def test_only_adjusted_langevin_is_exact_at_large_steps(adjusted):
    dde = exact_dde(0.5, [[0.3, -0.2]], np.diag([0.75, 1.75]))
    x = langevin(dde, normal(60_000, 2), 40, step_size=0.8, adjusted=adjusted, seed=2)
    variance = np.array([1.0, 2.0])
    assert_gaussian(x, [0.3, -0.2], variance if adjusted else variance / (1 - 0.8 / (2 * variance)))


def test_adjusted_langevin_follows_a_curved_density():
    dde = exact_dde(1.0, [[0.0, 0.0]], np.zeros((2, 2)), bend=0.5)
    x = langevin(dde, normal(40_000, 2), 150, step_size=0.3, adjusted=True, seed=3)
    x[:, 1] += 0.5 * (x[:, 0] ** 2 - 1)
    assert_gaussian(x, 0.0, 1.0)
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-4


def test_default_step_size_is_a_tenth_of_the_squared_level():
    dde, x = exact_8gaussians(), normal(50, 2)
    for level in (0.1, 0.7):
        given = langevin(dde, x, 5, step_size=0.1 * level**2, noise_std=level, seed=1)
        np.testing.assert_array_equal(langevin(dde, x, 5, noise_std=level, seed=1), given)
    np.testing.assert_array_equal(langevin(dde, x, 5, seed=1), langevin(dde, x, 5, noise_std=0.1, seed=1))


def test_chunks_do_not_matter(monkeypatch):
    dde, x = exact_8gaussians(), normal(25, 2)
    for sample in (
        lambda: langevin(dde, x, 3, seed=0),
        lambda: np.array(log_partition(dde, x, 250, num_steps=5, seed=0)),
    ):
        whole = sample()
        monkeypatch.setattr(sampling, "chunk_size", lambda _: 10)
        np.testing.assert_allclose(sample(), whole, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()
    moved = langevin(exact_dde(0.5, [[0.0]], [[0.75]]), np.zeros((2500, 1)), 3, step_size=0.1, seed=0)
    assert len(np.unique(moved)) > 2490


# --- Annealed Langevin dynamics ---


def test_annealed_langevin_gives_each_of_8_gaussians_its_share():
    x = annealed_langevin(exact_8gaussians(), 30_000, seed=1)
    distances = distances_to_modes("8gaussians", x)
    shares = mode_shares(distances)
    np.testing.assert_array_less(np.abs(shares - 1 / 8), 4.5 * np.sqrt(1 / 8 * 7 / 8 / len(x)))
    np.testing.assert_allclose((distances.min(axis=1) ** 2).mean() / 2, GAUSSIAN_STD**2, rtol=0.05)


def test_annealed_langevin_gives_unequal_modes_their_shares():
    dde = exact_dde((0.1, 2.0), [[-2.0, 0.0], [2.0, 0.0]], 0.04 * np.eye(2), weights=[0.2, 0.8])
    x = annealed_langevin(dde, 20_000, num_levels=240, seed=2)
    assert abs(np.mean(x[:, 0] < 0) - 0.2) < 4.5 * np.sqrt(0.2 * 0.8 / len(x))


def test_annealed_langevin_takes_the_noise_off_at_the_end():
    dde = exact_dde((0.5, 2.0), [[0.0, 0.0]], np.eye(2))
    options = {"n_samples": 60_000, "num_levels": 150, "step_ratio": 0.1, "seed": 3}
    noisy = 1 + 0.5**2
    noisy /= 1 - 0.1 * 0.5**2 / (2 * noisy)
    assert_gaussian(annealed_langevin(dde, **options), 0.0, noisy * (1 - 0.5**2 / (2 * 1.25)) ** 2, sigmas=6)


def test_annealed_langevin_follows_its_recursion_on_a_gaussian():
    dde = exact_dde((0.5, 2.0), [[0.4, 0.0]], np.diag([0.25, 4.0]))
    levels, ratio = np.append(np.geomspace(2.0, 0.5, 4), 0.0), 0.3
    mean, variance = np.zeros(2), np.full(2, 2 * 2.0**2)
    for index, (level, next_level) in enumerate(itertools.pairwise(levels)):
        noisy, step_size = np.array([0.25, 4.0]) + level**2, ratio * level**2
        for _ in range(10 if index == 0 else 1):
            mean, variance = mean * (1 - step_size / noisy), variance * (1 - step_size / noisy) ** 2 + 2 * step_size
            mean = mean + step_size / noisy * np.array([0.4, 0.0])
        flow = 1 - (level**2 - next_level**2) / (2 * noisy)
        mean, variance = np.array([0.4, 0.0]) + flow * (mean - np.array([0.4, 0.0])), variance * flow**2
    assert_gaussian(annealed_langevin(dde, 100_000, 4, ratio, seed=4), mean, variance)


# --- Corrected points ---

FAR_APART, STD = [[-2.0, 0.0], [2.0, 0.0]], 0.3


def two_modes(noise_std, left, offset=OFFSET):
    return exact_dde(noise_std, FAR_APART, STD**2 * np.eye(2), weights=[left, 1 - left], offset=offset)


def sampler_of(dde):
    return lambda n, seed: draw_data(dde, n, seed)


@pytest.mark.parametrize(
    ("noise_std", "options"),
    [
        (0.2, {}),
        ((0.1, 1.0), {"noise_std": 0.2}),
        ((0.05, 1.0), {"noise_std": 0.3, "rejection_std": 0.5}),
        ((0.05, 1.0), {"noise_std": 0.3, "rejection_std": 0.5, "denoise_std": 0.2}),
    ],
)
def test_corrected_points_have_the_density_that_both_reach(noise_std, options):
    # Of modes with shares 80 and 20 % in the data, 50 and 50 % in the points, min(1, r) leaves 50 and 20.
    real, fake = two_modes(noise_std, 0.8), two_modes(noise_std, 0.5, offset=30.0)
    x = correct(sampler_of(fake), 60_000, real, fake, seed=1, **options)
    assert x.shape == (60_000, 2) and x.dtype == np.float32
    is_left = x[:, 0] < 0
    assert abs(is_left.mean() - 0.5 / 0.7) < 4.5 * np.sqrt(0.2 / len(x))
    # A step of the flow on a Gaussian multiplies the distance from its mean.
    level, clean = options.get("noise_std", 0.2), STD**2
    noisy, halfway = clean + level**2, clean + level**2 / 2
    is_midpoint = isinstance(noise_std, tuple)
    factor = 1 - level**2 / 2 * ((1 - level**2 / 4 / noisy) / halfway if is_midpoint else 1 / noisy)
    factor *= clean / (clean + options["denoise_std"] ** 2) if "denoise_std" in options else 1
    for part, mean in ((x[is_left], FAR_APART[0]), (x[~is_left], FAR_APART[1])):
        assert_gaussian(part, mean, factor**2 * noisy)


def test_default_level_of_corrected_points():
    real, fake = two_modes((0.1, 1.0), 0.8), two_modes((0.1, 1.0), 0.5)
    given = correct(sampler_of(fake), 50, real, fake, noise_std=0.2 * math.sqrt(2), seed=1)
    np.testing.assert_array_equal(correct(sampler_of(fake), 50, real, fake, seed=1), given)


def test_as_many_corrected_points_come_as_were_asked_for():
    real, fake, sizes = two_modes((0.1, 1.0), 0.9), two_modes((0.1, 1.0), 0.1), []

    def sample(n, seed):
        sizes.append(n)
        return draw_data(fake, n, seed)

    x = correct(sample, 10_000, real, fake, seed=2)
    assert x.shape == (10_000, 2)
    # A fifth is kept, and the constant is that of all points, be they drawn in one go or in several.
    assert sizes[0] == 11_000 and sum(sizes) > 45_000
    assert abs(np.mean(x[:, 0] < 0) - 0.5) < 4.5 * np.sqrt(0.25 / len(x))


def test_densities_that_have_nothing_in_common_correct_nothing():
    real, fake = (exact_dde((0.1, 1.0), [mean], 0.01 * np.eye(2)) for mean in ([0.0, 0.0], [5.0, 0.0]))
    with pytest.raises(ValueError, match=r"too little in common to correct points: they keep \d+ of 2200 points"):
        correct(sampler_of(fake), 2000, real, fake, seed=1)
    with pytest.raises(ValueError, match="too little in common"):
        correct(sampler_of(fake), 20, two_modes(0.3, 0.5, offset=math.nan), two_modes(0.3, 0.5))


def test_an_egm_corrects_its_samples():
    egm = EGM.load("example_models/rings.keras")
    expected = correct(egm.sample, 500, egm.dde_real, egm.dde_fake, noise_std=0.1, seed=3)
    np.testing.assert_array_equal(egm.sample(500, seed=3, corrected=True, noise_std=0.1), expected)
    with pytest.raises(ValueError, match="noise_std cannot be given without corrected=True"):
        egm.sample(5, noise_std=0.1)


# --- The constant ---


def draw_data(dde, n_samples, seed=5):
    """Clean data of an exact density."""
    layer = next(layer for layer in dde.net.layers if isinstance(layer, ExactLogDensity))
    rng = np.random.default_rng(seed)
    x = layer.means[rng.choice(len(layer.means), size=n_samples, p=layer.shares)]
    x = x + rng.multivariate_normal(np.zeros(x.shape[1]), layer.covariance, size=n_samples)
    if layer.bend:
        x[:, 1] -= layer.bend * (x[:, 0] ** 2 - 1)
    return x.reshape(-1, *dde.event_shape)


def assert_estimates(result, value=OFFSET, largest_error=0.1, sigmas=4.5):
    assert 0 < result.standard_error < largest_error
    assert abs(result.value - value) < sigmas * result.standard_error + 1e-4
    assert result.is_reliable
    np.testing.assert_allclose(
        result.standard_error, np.sqrt(1 / result.effective_sample_size - 1 / result.n_samples), rtol=1e-3
    )


@pytest.mark.parametrize("dim", [2, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (8, 21)), 63])
def test_log_partition_of_gaussians(dim):
    axes = rotation(dim)
    covariance = axes * np.geomspace(0.05, 2, dim) @ axes.T
    dde = exact_dde((0.1, 2.0), [np.linspace(-1, 1, dim)], covariance)
    result = log_partition(dde, draw_data(dde, 4000), n_samples=2000, num_steps=60, seed=1)
    assert_estimates(result, largest_error=0.02)


@pytest.mark.parametrize("dim", [2, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (8, 21)), 63])
def test_log_partition_of_mixtures(dim):
    means = 1.5 * np.eye(dim)[:2] - 0.75 * np.eye(dim)[1:2]
    dde = exact_dde((0.1, 2.0), means, 0.2 * np.eye(dim), weights=[0.3, 0.7])
    data = draw_data(dde, 4000)
    assert_estimates(log_partition(dde, data, n_samples=1000, num_steps=30, seed=2), largest_error=0.02)
    assert_estimates(log_partition(dde, data, n_samples=1000, noise_std=0.3, seed=2))


@pytest.mark.parametrize("dim", [2, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (8, 21)), 63])
def test_log_partition_of_bananas(dim):
    dde = exact_dde(0.3, [np.zeros(dim)], (1 - 0.3**2) * np.eye(dim), bend=0.3)
    data = draw_data(dde, 4000)
    assert_estimates(log_partition(dde, data, n_samples=2000, num_steps=200, seed=3), largest_error=0.05)


def test_log_partition_of_one_low_level_with_far_modes():
    dde = exact_8gaussians(noise_std=0.1)
    data = sample_2d_data("8gaussians", 4000, rng=0)
    assert_estimates(log_partition(dde, data, n_samples=5000, seed=4), largest_error=0.03)


def test_log_partition_of_untied_levels_needs_one():
    dde = exact_8gaussians()
    dde.dual_weight = 0.0
    data = sample_2d_data("8gaussians", 1000, rng=0)
    with pytest.raises(ValueError, match=r"noise_std must be the level to integrate at, within \(0.1, 1.5\), got None"):
        log_partition(dde, data)
    assert log_partition(dde, data, n_samples=100, noise_std=0.5, num_steps=5, seed=0).noise_std == 0.5
    assert log_partition(exact_8gaussians(), data, n_samples=100, num_steps=5, seed=0).noise_std == 1.5


def test_annealing_goes_where_the_score_leads():
    # A step that is accepted or rejected is exact with a wrong score, too, but it does not get far.
    axes = rotation(8)
    dde = exact_dde(0.1, [np.zeros(8)], axes * np.geomspace(0.05, 2, 8) @ axes.T)
    data = draw_data(dde, 4000)
    data += 0.7 * data.std(axis=0)
    result = log_partition(dde, data, n_samples=2000, seed=7)
    assert_estimates(result)
    assert result.effective_sample_size > 1300  # a wrong sign leaves 150, a transposed factor 570


@pytest.mark.slow
def test_standard_error_is_the_scatter_of_estimates():
    dde = exact_8gaussians(noise_std=0.1)
    data = sample_2d_data("8gaussians", 4000, rng=0)
    results = [log_partition(dde, data, n_samples=1000, num_steps=20, seed=seed) for seed in range(30)]
    values = [result.value for result in results]
    errors = [result.standard_error for result in results]
    assert abs(np.mean(values) - OFFSET) < 4.5 * np.mean(errors) / np.sqrt(30)
    # The standard deviation of 30 numbers is known to 13 %.
    np.testing.assert_allclose(np.std(values), np.mean(errors), rtol=0.5)


@pytest.mark.parametrize("conditional", [False, True])
def test_log_partition_of_a_network_is_that_of_a_grid(conditional):
    net = build_energy_net(2, conditional, (32, 32), data_std=1.5, feature_scale=1.0, seed=3)
    dde = DDE(net, (0.2, 1.0) if conditional else 0.2, seed=0)
    axis = np.linspace(-10, 10, 401)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_density = dde.log_density(grid, noise_std=dde.noise_range[1]).numpy()[:, 0].astype(float)
    assert np.ptp(log_density[np.linalg.norm(grid, axis=1) < 1]) > 0.3
    expected = logsumexp(log_density) + 2 * np.log(axis[1] - axis[0])
    result = log_partition(dde, 1.5 * normal(4000, 2), num_steps=50, seed=5)
    assert result.standard_error < 0.01 / 4
    np.testing.assert_allclose(result.value, expected, atol=0.01)


def test_highest_level_of_a_trained_model_gives_the_constant_of_the_lowest():
    dde = EGM.load("example_models/8gaussians.keras").dde_real
    axis = np.linspace(-7, 7, 281)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    exact = logsumexp(dde.log_density(grid).numpy()[:, 0].astype(float)) + 2 * np.log(axis[1] - axis[0])
    result = log_partition(dde, sample_2d_data("8gaussians", 4000, rng=1), num_steps=30, seed=6)
    assert result.effective_sample_size > 0.9 * result.n_samples
    np.testing.assert_allclose(result.value, exact, atol=0.02)  # the levels of this model agree to 0.006


def test_low_effective_sample_size_warns():
    dde = exact_dde(0.1, [np.zeros(21)], 0.2 * np.eye(21))
    data = draw_data(dde, 1000)
    with pytest.warns(UserWarning, match="effective sample size of .* most likely too low"):
        result = log_partition(dde, data + 3, num_steps=3, seed=1)
    assert not result.is_reliable
    assert result.value < OFFSET
    with pytest.warns(UserWarning, match="99 points"):
        assert not log_partition(dde, data, n_samples=99, seed=1).is_reliable


# --- All of them ---


def calls(dde, **options):
    x = normal(200, *dde.event_shape)
    return {
        "langevin": lambda **more: langevin(dde, x, **{"num_steps": 5, **options, **more}),
        "adjusted": lambda **more: langevin(dde, x, **{"num_steps": 5, "adjusted": True, **options, **more}),
        "annealed_langevin": lambda **more: annealed_langevin(dde, 200, **{"num_levels": 3, **options, **more}),
        "correct": lambda **more: correct(
            lambda n, seed: normal(n, *dde.event_shape, seed=seed), 200, dde, dde, **more
        ),
        "log_partition": lambda **more: log_partition(dde, x, **{"n_samples": 200, "num_steps": 9, **options, **more}),
    }


def test_equal_seeds_give_equal_results_and_others_do_not():
    for name, call in calls(exact_dde((0.5, 2.0), [np.zeros(2)], np.eye(2))).items():
        first, again, other, unseeded = (np.asarray(call(seed=seed)) for seed in (7, 7, 8, None))
        np.testing.assert_array_equal(first, again, err_msg=name)
        assert not np.array_equal(first, other) and not np.array_equal(first, unseeded), name


@double_precision()
def test_float64_policy():
    dde = exact_dde((0.5, 2.0), [np.zeros(2)], np.eye(2))
    for name, call in calls(dde, seed=0).items():
        result = call()
        if isinstance(result, np.ndarray):
            assert result.dtype == np.float64 and np.isfinite(result).all(), name
        else:
            assert_estimates(result)


def test_points_of_any_shape():
    axes = rotation(12)
    dde = exact_dde((0.3, 2.0), [np.zeros(12)], axes * np.geomspace(0.1, 1, 12) @ axes.T, event_shape=(2, 3, 2))
    flat = exact_dde((0.3, 2.0), [np.zeros(12)], axes * np.geomspace(0.1, 1, 12) @ axes.T)
    for (name, call), flat_call in zip(calls(dde, seed=1).items(), calls(flat, seed=1).values(), strict=True):
        result, flat_result = call(), flat_call()
        if isinstance(result, np.ndarray):
            assert result.shape == (200, 2, 3, 2) and result.dtype == np.float32
            result = result.reshape(200, 12)
            if "annealed" not in name:  # starts at other points
                continue
        np.testing.assert_allclose(np.asarray(result, float), np.asarray(flat_result, float), rtol=1e-3, atol=1e-4)


def test_network_without_an_input_is_built_first():
    net = keras.Sequential([keras.layers.Dense(16, "tanh"), keras.layers.Dense(1, use_bias=False)])
    assert np.isfinite(langevin(DDE(net, 0.5, seed=0), normal(10, 3), 3, seed=0)).all()
    with pytest.raises(ValueError, match="range of levels"):
        annealed_langevin(DDE(net, 0.5, seed=0), 10)


def test_new_weights_count():
    dde = DDE(build_energy_net(noise_conditional=True, widths=(8,), data_std=1.0), (0.5, 1.0), seed=0)
    x = normal(50, 2)
    before = langevin(dde, x, 3, seed=0)
    dde.set_weights([3 * weight for weight in dde.get_weights()])
    assert not np.array_equal(langevin(dde, x, 3, seed=0), before)


def test_diverging_points_are_an_error():
    with pytest.raises(FloatingPointError, match="step_size=3 is too large"):
        langevin(exact_dde(0.5, [[0.0]], [[0.0]]), np.ones((5, 1)), 200, step_size=3.0)
    with pytest.raises(FloatingPointError, match="step_ratio=9 is too large"):
        annealed_langevin(exact_8gaussians(), 10, step_ratio=9)


def test_log_density_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="log density"):
        log_partition(exact_8gaussians(offset=math.nan), normal(100, 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("langevin", {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ("langevin", {"step_size": -1.0}, "step_size must be a positive finite number, got -1.0"),
        ("langevin", {"step_size": math.nan}, "step_size must be a positive finite number, got nan"),
        ("langevin", {"noise_std": 3.0}, r"noise_std must be within \[0.5, 2.0\], .* got 3.0"),
        ("langevin", {"noise_std": [0.5, 0.6]}, "noise_std must be a positive finite number"),
        ("langevin", {"seed": -1}, "seed, unless it is None, must be an integer"),
        ("annealed_langevin", {"num_levels": 1}, "num_levels must be an integer of at least 2, got 1"),
        ("annealed_langevin", {"step_ratio": 0}, "step_ratio must be a positive finite number, got 0"),
        ("log_partition", {"n_samples": True}, "n_samples must be an integer of at least 1, got True"),
        ("log_partition", {"noise_std": 0.1}, "noise_std must be within"),
        ("log_partition", {"num_steps": -5}, "num_steps must be an integer of at least 1, got -5"),
    ],
)
def test_bad_arguments(name, options, message):
    dde = exact_dde((0.5, 2.0), [np.zeros(2)], np.eye(2))
    with pytest.raises(ValueError, match=message):
        calls(dde)[name](**options)


def test_bad_data_and_models():
    dde = exact_dde((0.5, 2.0), [np.zeros(2)], np.eye(2))
    for function in (langevin, log_partition):
        with pytest.raises(ValueError, match=r"must have shape \(n, 2\), got \(5, 3\)"):
            function(dde, normal(5, 3))
        with pytest.raises(ValueError, match="must be finite"):
            function(dde, [[1.0, math.inf]])
        with pytest.raises(ValueError, match="dde must be a DDE"):
            function(dde.net, normal(5, 2))
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got 0"):
        annealed_langevin(dde, 0)
    with pytest.raises(ValueError, match="dde must be a DDE"):
        annealed_langevin(None, 5)
