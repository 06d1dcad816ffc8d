"""Points and constants against closed forms: the networks are exact log densities, with an offset that is known."""

import itertools
import math
from functools import partial
from unittest.mock import Mock

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


class ExactLogDensity(keras.layers.Layer):
    """Log density of a mixture of Gaussians of equal covariance plus noise, plus an offset."""

    def __init__(self, means, covariance, weights=None, offset=OFFSET):
        super().__init__(autocast=False)
        self.means, self.covariance, self.offset = np.array(means, dtype=float), np.array(covariance), offset
        self.shares = np.full(len(means), 1 / len(means)) if weights is None else np.array(weights)

    def call(self, x, log_noise_std):
        variances, axes = np.linalg.eigh(self.covariance)
        coordinates = tf.matmul(tf.reshape(x, (-1, len(variances))), tf.cast(axes, x.dtype))
        differences = coordinates[:, None] - tf.cast(self.means @ axes, x.dtype)  # (n, k, d)
        variances = tf.cast(variances, x.dtype) + tf.exp(2 * log_noise_std)  # (n, d)
        exponents = -tf.reduce_sum(tf.square(differences) / variances[:, None], axis=2) / 2
        log_norm = tf.reduce_sum(tf.math.log(2 * math.pi * variances), axis=1, keepdims=True) / 2
        log_weights = tf.cast(np.log(self.shares), x.dtype)
        return tf.reduce_logsumexp(exponents + log_weights, axis=1, keepdims=True) - log_norm + self.offset


def exact_dde(noise_std, means, covariance, event_shape=None, **options):
    layer = ExactLogDensity(means, covariance, **options)
    x, log_noise_std = keras.Input(event_shape or (len(covariance),)), keras.Input((1,))
    if isinstance(noise_std, tuple):
        return DDE(keras.Model([x, log_noise_std], layer(x, log_noise_std)), noise_std, seed=0)
    log_noise_std = keras.layers.Rescaling(0.0, math.log(noise_std))(keras.layers.Flatten()(x)[:, :1])
    return DDE(keras.Model(x, layer(x, log_noise_std)), noise_std, seed=0)


def exact_8gaussians(noise_std=(0.1, 1.5), **options):
    return exact_dde(noise_std, GAUSSIAN_CENTRES, GAUSSIAN_STD**2 * np.eye(2), **options)


def exact_normal():
    return exact_dde((0.5, 2.0), [np.zeros(2)], np.eye(2))


def draw_data(dde, n_samples, seed=5):
    """Clean data of an exact density."""
    layer = next(layer for layer in dde.net.layers if isinstance(layer, ExactLogDensity))
    rng = np.random.default_rng(seed)
    x = layer.means[rng.choice(len(layer.means), size=n_samples, p=layer.shares)]
    x = x + rng.multivariate_normal(np.zeros(x.shape[1]), layer.covariance, size=n_samples)
    return x.reshape(-1, *dde.event_shape)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def assert_gaussian(x, mean, variance):
    """Check mean and variance of independent normal columns (n, d), to 4.5 standard errors."""
    assert (np.abs(x.mean(axis=0) - mean) < 4.5 * np.sqrt(variance / len(x))).all()
    assert (np.abs(x.var(axis=0) / variance - 1) < 4.5 * np.sqrt(2 / len(x))).all()


# --- Langevin dynamics at one level ---

VARIANCES, LEVEL = np.array([0.1, 0.5, 2.0]), 0.6
AXES = stats.ortho_group(3, seed=0).rvs()
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


def test_adjusted_langevin_follows_a_curved_density():
    # Of standard normal points, x_2 is moved along a parabola, which does not change volumes.
    def straighten(x):
        return keras.ops.stack([x[:, 0], x[:, 1] + 0.5 * (x[:, 0] ** 2 - 1)], axis=1)

    x = keras.Input((2,))
    log_density = -0.5 * keras.ops.sum(straighten(x) ** 2, axis=1, keepdims=True)
    dde = DDE(keras.Model(x, log_density), 1.0, seed=0)
    u = straighten(langevin(dde, normal(40_000, 2), 150, step_size=0.3, adjusted=True, seed=3)).numpy()
    assert_gaussian(u, 0.0, 1.0)
    assert stats.kstest(u.ravel(), "norm").pvalue > 1e-4


def test_chunks_do_not_matter(monkeypatch):
    dde, x = exact_8gaussians(), normal(25, 2)
    samplers = partial(langevin, dde, x, 3, seed=0), partial(log_partition, dde, x, 250, num_steps=5, seed=0)
    whole = [sample() for sample in samplers]
    monkeypatch.setattr(sampling, "chunk_size", lambda _: 10)
    for sample, expected in zip(samplers, whole, strict=True):
        np.testing.assert_allclose(sample(), expected, rtol=1e-5, atol=1e-5)


# --- Annealed Langevin dynamics ---


def test_annealed_langevin_gives_each_of_8_gaussians_its_share():
    weights = np.arange(1, 9) / 36
    distances = distances_to_modes("8gaussians", annealed_langevin(exact_8gaussians(weights=weights), 30_000, seed=1))
    np.testing.assert_allclose(mode_shares(distances), weights, atol=0.015)  # with 60 levels; more have less error
    np.testing.assert_allclose((distances.min(axis=1) ** 2).mean() / 2, GAUSSIAN_STD**2, rtol=0.05)


def test_annealed_langevin_follows_its_recursion_on_a_gaussian():
    centre, clean, ratio = np.array([0.4, 0.0]), np.array([0.25, 16.0]), 0.3
    dde = exact_dde((0.5, 2.0), [centre], np.diag(clean))
    offset, variance = -centre, np.full(2, 2 * 2.0**2)
    for level, next_level in itertools.pairwise([*np.geomspace(2.0, 0.5, 4), 0.0]):
        noisy, step_size = clean + level**2, ratio * level**2
        for _ in range(10 if level == 2.0 else 1):
            factor = 1 - step_size / noisy
            offset, variance = factor * offset, factor**2 * variance + 2 * step_size
        flow = 1 - (level**2 - next_level**2) / (2 * noisy)
        offset, variance = flow * offset, flow**2 * variance
    assert_gaussian(annealed_langevin(dde, 100_000, 4, ratio, seed=4), centre + offset, variance)


def test_annealed_langevin_starts_at_the_mean_that_the_network_was_built_for():
    data = np.array([100.0, -30.0]) + normal(500, 2)
    dde = DDE(build_energy_net(data=data, noise_conditional=True, widths=(4,), seed=1), (0.5, 1.0), seed=0)
    x = annealed_langevin(dde, 500, num_levels=2, seed=5)
    np.testing.assert_allclose(x.mean(axis=0), data.mean(axis=0), atol=1.5)


# --- Corrected points ---

FAR_APART, STD = [[-2.0, 0.0], [2.0, 0.0]], 0.3


def two_modes(noise_std, left, offset=OFFSET):
    return exact_dde(noise_std, FAR_APART, STD**2 * np.eye(2), weights=[left, 1 - left], offset=offset)


JUDGED_APART = {"noise_std": 0.3, "rejection_std": 0.5}
CORRECTIONS = [(0.4, {}), ((0.1, 1.0), {"noise_std": 0.2}), ((0.05, 1.0), JUDGED_APART)]
CORRECTIONS.append(((0.05, 1.0), {**JUDGED_APART, "denoise_std": 0.2}))


@pytest.mark.parametrize(("noise_std", "options"), CORRECTIONS)
def test_corrected_points_have_the_density_that_both_reach(noise_std, options):
    # Of modes with shares 80 and 20 % in the data, 50 and 50 % in the points, min(1, r) leaves 50 and 20.
    real, fake = two_modes(noise_std, 0.8), two_modes(noise_std, 0.5, offset=30.0)
    x = correct(partial(draw_data, fake), 60_000, real, fake, seed=1, **options)
    assert x.shape == (60_000, 2) and x.dtype == np.float32
    is_left = x[:, 0] < 0
    assert abs(is_left.mean() - 0.5 / 0.7) < 4.5 * np.sqrt(0.2 / len(x))
    # A step of the flow on a Gaussian multiplies the distance from its mean.
    level, clean = options.get("noise_std", 0.4), STD**2
    noisy, halfway = clean + level**2, clean + level**2 / 2
    is_midpoint = isinstance(noise_std, tuple)
    factor = 1 - level**2 / 2 * ((1 - level**2 / 4 / noisy) / halfway if is_midpoint else 1 / noisy)
    factor *= clean / (clean + options["denoise_std"] ** 2) if "denoise_std" in options else 1
    for part, mean in ((x[is_left], FAR_APART[0]), (x[~is_left], FAR_APART[1])):
        assert_gaussian(part, mean, factor**2 * noisy)


def test_as_many_corrected_points_come_as_were_asked_for():
    real, fake = two_modes((0.1, 1.0), 0.9), two_modes((0.1, 1.0), 0.1)
    sample = Mock(side_effect=partial(draw_data, fake))
    x = correct(sample, 10_000, real, fake, seed=2)
    assert x.shape == (10_000, 2)
    assert abs(np.mean(x[:, 0] < 0) - 0.5) < 4.5 * np.sqrt(0.25 / len(x))
    sizes, seeds = zip(*((call.args[0], call.kwargs["seed"]) for call in sample.call_args_list), strict=True)
    assert sizes[0] == 11_000 and sum(sizes) > 45_000 and len(set(seeds)) == len(seeds)  # a fifth is kept


def test_the_constant_of_the_rejection_is_that_of_all_points():
    # The ratio is 9 on the left, where half of the first points are, and 1/9 on the right, where all others are.
    sizes, modes = [], np.array(FAR_APART)

    def sample(n, seed):
        sizes.append(n)
        return np.repeat(modes, [n // 2, n - n // 2], axis=0) if len(sizes) == 1 else np.repeat(modes[1:], n, axis=0)

    correct(sample, 10_000, two_modes((0.1, 1.0), 0.9), two_modes((0.1, 1.0), 0.1), seed=2)
    assert 49_000 < sum(sizes) < 55_000  # 10,000 for the constant of the last part, 190,000 for that of the first


def test_densities_that_have_nothing_in_common_correct_nothing():
    real, fake = (exact_dde((0.1, 1.0), [mean], 0.01 * np.eye(2)) for mean in ([0.0, 0.0], [5.0, 0.0]))
    with pytest.raises(ValueError, match=r"too little in common to correct points: they keep \d+ of 2200 points"):
        correct(partial(draw_data, fake), 2000, real, fake, seed=1)
    with pytest.raises(ValueError, match="too little in common"):
        correct(partial(draw_data, fake), 20, two_modes(0.3, 0.5, offset=math.nan), two_modes(0.3, 0.5))


def test_an_egm_corrects_its_samples():
    egm = EGM.load("example_models/rings.keras")
    expected = correct(egm.sample, 500, egm.dde_real, egm.dde_fake, noise_std=0.1, seed=3)
    np.testing.assert_array_equal(egm.sample(500, seed=3, corrected=True, noise_std=0.1), expected)
    with pytest.raises(ValueError, match="noise_std cannot be given without corrected=True"):
        egm.sample(5, noise_std=0.1)


# --- The constant ---


def assert_estimates(result, largest_error=0.1):
    assert result.is_reliable and 0 < result.standard_error < largest_error
    assert abs(result.value - OFFSET) < 4.5 * result.standard_error + 1e-4
    expected_error = np.sqrt(1 / result.effective_sample_size - 1 / result.n_samples)
    np.testing.assert_allclose(result.standard_error, expected_error, rtol=1e-3)


@pytest.mark.parametrize("dim", [2, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (8, 21)), 63])
def test_log_partition_of_mixtures(dim):
    means = 1.5 * np.eye(dim)[:2] - 0.75 * np.eye(dim)[1:2]
    dde = exact_dde((0.1, 2.0), means, 0.2 * np.eye(dim), weights=[0.3, 0.7])
    data = draw_data(dde, 4000)
    assert_estimates(log_partition(dde, data, n_samples=1000, num_steps=30, seed=2), largest_error=0.02)
    assert_estimates(log_partition(dde, data, n_samples=1000, noise_std=0.3, seed=2))


def test_log_partition_names_its_level():
    dde = exact_normal()
    assert calls(dde)["log_partition"]().noise_std == 2.0
    dde.dual_weight = 0.0  # each level has a constant of its own
    assert calls(dde)["log_partition"](noise_std=0.7).noise_std == 0.7
    with pytest.raises(ValueError, match=r"noise_std must be the level to integrate at, within \(0.5, 2.0\), got None"):
        calls(dde)["log_partition"]()


def test_annealing_goes_where_the_score_leads():
    # A step that is accepted or rejected is exact with a wrong score, too, but it does not get far.
    axes = stats.ortho_group(8, seed=0).rvs()
    dde = exact_dde(0.1, [np.zeros(8)], axes * np.geomspace(0.05, 2, 8) @ axes.T)
    data = draw_data(dde, 4000)
    data += 0.7 * data.std(axis=0)
    result = log_partition(dde, data, n_samples=2000, seed=7)
    assert_estimates(result)
    assert result.effective_sample_size > 1300  # a wrong sign leaves 150, a transposed factor 570


def test_steps_adapt_to_a_density_narrower_than_the_data():
    dde = exact_dde(0.1, [np.zeros(8)], 0.01 * np.eye(8))
    estimate = partial(log_partition, dde, 0.3 * normal(1000, 8), seed=1)
    result = estimate(n_samples=2000, num_steps=100)
    assert_estimates(result)
    assert result.effective_sample_size > 800  # it is 110 if all steps have the size that is best at first
    with pytest.warns(UserWarning, match=r"size of \d{3}\."):  # more than 100, but less than a tenth
        assert not estimate(n_samples=5000, num_steps=20).is_reliable


@pytest.mark.slow
def test_standard_error_is_the_scatter_of_estimates():
    dde, data = exact_8gaussians(noise_std=0.1), sample_2d_data("8gaussians", 4000, rng=0)
    results = [log_partition(dde, data, n_samples=1000, num_steps=20, seed=seed) for seed in range(30)]
    values, errors = np.array([(result.value, result.standard_error) for result in results]).T
    assert abs(np.mean(values) - OFFSET) < 4.5 * np.mean(errors) / np.sqrt(30)
    np.testing.assert_allclose(np.std(values), np.mean(errors), rtol=0.5)  # that of 30 numbers is known to 13 %


def integrate(dde, limit, noise_std):
    """Logarithm of the integral of exp(log density) over a plane, and how much the log density varies near 0."""
    axis = np.linspace(-limit, limit, 401)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_density = dde.log_density(grid, noise_std=noise_std).numpy()[:, 0].astype(float)
    spread = np.ptp(log_density[np.linalg.norm(grid, axis=1) < 1])
    return logsumexp(log_density) + 2 * np.log(axis[1] - axis[0]), spread


@pytest.mark.parametrize("conditional", [False, True])
def test_log_partition_of_a_network_is_that_of_a_grid(conditional):
    net = build_energy_net(2, conditional, (32, 32), data_std=1.5, feature_scale=1.0, seed=3)
    dde = DDE(net, (0.2, 1.0) if conditional else 0.2, seed=0)
    expected, spread = integrate(dde, 10, noise_std=dde.noise_range[1])
    assert spread > 0.3
    result = log_partition(dde, 1.5 * normal(4000, 2), num_steps=50, seed=5)
    assert result.standard_error < 0.01 / 4
    np.testing.assert_allclose(result.value, expected, atol=0.01)


def test_highest_level_of_a_trained_model_gives_the_constant_of_the_lowest():
    dde = EGM.load("example_models/8gaussians.keras").dde_real
    result = log_partition(dde, sample_2d_data("8gaussians", 4000, rng=1), num_steps=30, seed=6)
    assert result.effective_sample_size > 0.9 * result.n_samples
    np.testing.assert_allclose(result.value, integrate(dde, 7, None)[0], atol=0.02)  # this model's agree to 0.006


def test_low_effective_sample_size_warns():
    dde = exact_dde(0.1, [np.zeros(21)], 0.2 * np.eye(21))
    data = draw_data(dde, 1000)
    with pytest.warns(UserWarning, match="effective sample size of .* most likely too low"):
        result = log_partition(dde, data + 3, num_steps=3, seed=1)
    assert not result.is_reliable and result.value < OFFSET
    with pytest.warns(UserWarning, match="99 points"):
        assert not log_partition(dde, data, n_samples=99, seed=1).is_reliable


# --- All of them ---


def calls(dde):
    """Short calls of all functions; options that are given replace those here."""
    x = normal(200, *dde.event_shape)
    return {
        "langevin": partial(langevin, dde=dde, x=x, num_steps=5),
        "adjusted": partial(langevin, dde=dde, x=x, num_steps=5, adjusted=True),
        "annealed_langevin": partial(annealed_langevin, dde=dde, n_samples=200, num_levels=3),
        "correct": partial(correct, sample=partial(draw_data, dde), n_samples=200, dde_real=dde, dde_fake=dde),
        "log_partition": partial(log_partition, dde=dde, data=x, n_samples=200, num_steps=9),
    }


def test_defaults_are_those_stated():
    dde, x = exact_8gaussians(), normal(50, 2)
    for call, defaults in (
        (partial(langevin, dde, x, 5, seed=1), {"noise_std": 0.1, "step_size": 0.1 * 0.1**2}),
        (partial(langevin, dde, x, 5, noise_std=0.7, seed=1), {"step_size": 0.1 * 0.7**2}),
        (partial(annealed_langevin, dde, 50, seed=1), {"num_levels": 60, "step_ratio": 0.3}),
        (partial(correct, partial(draw_data, dde), 50, dde, dde, seed=1), {"noise_std": 0.1 * 2 * math.sqrt(2)}),
    ):
        np.testing.assert_array_equal(call(**defaults), call())


def test_images_are_judged_at_a_high_level_and_denoised():
    real, fake = (exact_dde((0.1, 2.0), [np.full(12, m)], np.eye(12), event_shape=(2, 3, 2)) for m in (0.0, 0.2))
    call = partial(correct, partial(draw_data, fake), 50, real, fake, seed=1)
    np.testing.assert_array_equal(call(), call(rejection_std=2 / 3, denoise_std=0.25))
    for other in ({"rejection_std": 1.0}, {"denoise_std": 0.2}):
        assert not np.array_equal(call(), call(**other))


def test_equal_seeds_give_equal_results_and_others_do_not():
    for name, call in calls(exact_normal()).items():
        first, again, other, unseeded = (np.asarray(call(seed=seed)) for seed in (7, 7, 8, None))
        np.testing.assert_array_equal(first, again, err_msg=name)
        assert not np.array_equal(first, other) and not np.array_equal(first, unseeded), name


@double_precision()
def test_float64_policy():
    results = {name: call(seed=0) for name, call in calls(exact_normal()).items()}
    assert_estimates(results.pop("log_partition"))
    for name, x in results.items():
        assert x.dtype == np.float64 and np.isfinite(x).all(), name


def test_points_of_any_shape():
    axes = stats.ortho_group(12, seed=0).rvs()
    shaped, flat = (
        exact_dde((0.3, 2.0), [np.zeros(12)], axes * np.geomspace(0.1, 1, 12) @ axes.T, event_shape=shape)
        for shape in ((3, 4), (12,))
    )
    for (name, call), flat_call in zip(calls(shaped).items(), calls(flat).values(), strict=True):
        result, flat_result = call(seed=1), np.asarray(flat_call(seed=1), float)
        if name != "log_partition":
            assert result.shape == (200, 3, 4) and result.dtype == np.float32
        if name != "annealed_langevin":  # starts at other points
            result = np.reshape(np.asarray(result, float), flat_result.shape)
            np.testing.assert_allclose(result, flat_result, rtol=1e-3, atol=1e-4)


def unbuilt_dde(noise_std):
    return DDE(keras.Sequential([keras.layers.Dense(16, "tanh"), keras.layers.Dense(1, use_bias=False)]), noise_std)


def test_network_without_an_input_is_built_first():
    assert np.isfinite(langevin(unbuilt_dde(0.5), normal(10, 3), 3, seed=0)).all()


def test_new_weights_count():
    dde = DDE(build_energy_net(noise_conditional=True, widths=(8,), data_std=1.0), (0.5, 1.0), seed=0)
    before = langevin(dde, normal(50, 2), 3, seed=0)
    dde.set_weights([3 * weight for weight in dde.get_weights()])
    assert not np.array_equal(langevin(dde, normal(50, 2), 3, seed=0), before)


def test_what_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="step_size=3 is too large"):
        langevin(exact_dde(0.5, [[0.0]], [[0.0]]), np.ones((5, 1)), 200, step_size=3.0)
    with pytest.raises(FloatingPointError, match="step_ratio=9 is too large"):
        annealed_langevin(exact_8gaussians(), 10, step_ratio=9)
    with pytest.raises(FloatingPointError, match="log density"):
        log_partition(exact_8gaussians(offset=math.nan), normal(100, 2), n_samples=100, num_steps=5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("langevin", {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ("langevin", {"step_size": math.nan}, "step_size must be a positive finite number, got nan"),
        ("langevin", {"noise_std": 3.0}, r"noise_std must be within \[0.5, 2.0\], .* got 3.0"),
        ("langevin", {"noise_std": [0.5, 0.6]}, "noise_std must be a positive finite number"),
        ("langevin", {"seed": -1}, "seed, unless it is None, must be an integer"),
        ("langevin", {"x": normal(5, 3)}, r"must have shape \(n, 2\), got \(5, 3\)"),
        ("langevin", {"x": [[1.0, math.inf]]}, "must be finite"),
        ("langevin", {"dde": keras.Sequential()}, "dde must be a DDE"),
        ("annealed_langevin", {"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        ("annealed_langevin", {"num_levels": 1}, "num_levels must be an integer of at least 2, got 1"),
        ("annealed_langevin", {"step_ratio": 0}, "step_ratio must be a positive finite number, got 0"),
        ("annealed_langevin", {"dde": unbuilt_dde(0.5)}, "dde must have a range of levels"),
        ("annealed_langevin", {"dde": unbuilt_dde((0.5, 2.0))}, "must know the shape of its points"),
        ("annealed_langevin", {"dde": None}, "dde must be a DDE"),
        ("correct", {"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        ("correct", {"dde_fake": None}, "dde must be a DDE"),
        ("log_partition", {"n_samples": True}, "n_samples must be an integer of at least 1, got True"),
        ("log_partition", {"noise_std": 0.1}, "noise_std must be within"),
        ("log_partition", {"num_steps": -5}, "num_steps must be an integer of at least 1, got -5"),
        ("log_partition", {"data": normal(5, 3)}, r"must have shape \(n, 2\), got \(5, 3\)"),
        ("log_partition", {"data": [[1.0, math.inf]]}, "must be finite"),
        ("log_partition", {"dde": keras.Sequential()}, "dde must be a DDE"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        calls(exact_normal())[name](**options)
