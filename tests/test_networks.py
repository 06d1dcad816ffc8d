import itertools

import keras
import numpy as np
import pytest
from scipy import stats
from small_models import assert_equal_arrays, double_precision, make_egm, normal, relative_error

from egm_dde.image_networks import PixelMixture, ScoreScaling, Windows, build_image_energy_net, build_image_generator
from egm_dde.networks import DataScaling, GaussianLogDensity, NoiseScaling, RandomFourierFeatures
from energy_models import build_energy_net, build_generator

IMAGES = normal(50, 4, 3, 2, seed=3) * np.linspace(0.5, 2, 24).reshape(4, 3, 2) + 1


def layers_of(net, layer_class):
    return [layer for layer in net.layers if isinstance(layer, layer_class)]


def units_of(net):
    return [layer.units for layer in layers_of(net, keras.layers.Dense)]


def silence_correction(net):
    """Set the weights of the last layer that is trained to zero."""
    last = [layer for layer in layers_of(net, keras.layers.Dense) if layer.trainable][-1]
    last.set_weights([np.zeros_like(weight) for weight in last.get_weights()])


def log_density(net, x, level=None):
    return net(x if level is None else [x, np.full((len(x), 1), np.log(level))]).numpy()[:, 0]


# --- Layers ---


@pytest.mark.parametrize(
    ("data", "mean", "std"),
    [({}, 0, 1), ({"data_std": [2.0, 0.5], "data_mean": [10.0, -3.0]}, [10.0, -3.0], [[2.0], [0.5]])],
    ids=["standard", "any"],
)
def test_fourier_features_are_those_of_standard_points_blurred_by_their_noise(data, mean, std):
    layer = RandomFourierFeatures(num_features=500, scale=1.2, seed=3, **data)
    x, levels = np.float32(mean + normal(4, 2)), np.float32([0.0, 0.1, 0.3, 0.8])
    u = (x - mean) / np.ravel(std)
    features = [layer(x[:1]), layer(x[1:], np.log(levels[1:, None]))]
    frequencies = layer.get_weights()[0]  # (2, 500)
    assert layer.trainable_variables == []
    assert stats.kstest(frequencies.ravel(), stats.norm(scale=1.2).cdf).pvalue > 1e-3
    # The noise of a phase, in data units, averaged over by quadrature.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    noise = levels[:, None, None] * np.linalg.norm(frequencies / std, axis=0)[:, None] * nodes  # (4, 500, 80)
    phases = (u @ frequencies)[:, :, None] + noise
    blurred = [np.average(wave(phases), axis=-1, weights=weights) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(np.concatenate(features), np.concatenate([u, *blurred], axis=1), atol=1e-4)


def test_scalings_follow_the_widths_of_points_and_the_slopes_of_log_densities():
    x, levels = normal(4, 3), np.float32([[0.1], [0.5], [1.0], [30.0]])
    np.testing.assert_allclose(NoiseScaling(1.7)(x, np.log(levels)), x / np.hypot(1.7, levels), rtol=1e-5)
    np.testing.assert_allclose(NoiseScaling(1.7, 0.5)(x), (x - 0.5) / 1.7, rtol=1e-5)
    np.testing.assert_allclose(ScoreScaling(1.7)(x, np.log(levels)), x * np.hypot(1, 1.7 / levels), rtol=1e-5)


def test_windows_overlap_by_half_and_pass_the_edges():
    images = normal(2, 7, 8, 3)  # with margins of 2 and 3 rows, 2 and 2 columns around them
    padded = np.pad(images, [(0, 0), (2, 3), (2, 2), (0, 0)])
    windows = Windows()(images).numpy()
    assert windows.shape == (2, 4, 8 * 8 * 3)
    for window, (row, column) in zip(windows.swapaxes(0, 1), itertools.product((0, 4), (0, 4)), strict=True):
        expected = padded[:, row : row + 8, column : column + 8].reshape(2, -1)
        np.testing.assert_array_equal(np.sort(window), np.sort(expected))


def test_pixel_mixture_is_the_log_ratio_to_the_gaussian_of_the_same_moments():
    layer, level, x = PixelMixture(data_std=0.8), 0.3, normal(4, 2)
    layer.build((4, 2, 1, 1))
    shares, means = np.array([[0.7, 0.2], [0.1, 0.5], [0.2, 0.3]]), np.array([-1.0, 1.0, 0.2])
    variances = np.array([0.01, 0.02, 0.3])
    layer.set_weights([shares.reshape(3, 2, 1, 1), means, variances])
    kinds = stats.norm(means[:, None, None], np.sqrt(variances + level**2)[:, None, None])  # black, white, grey
    variance = (np.square(means) + variances) @ shares - (means @ shares) ** 2 + level**2
    log_mixture = np.log(np.sum(shares[:, None] * kinds.pdf(x), axis=0))  # (4, 2)
    log_ratio = log_mixture - stats.norm(means @ shares, np.sqrt(variance)).logpdf(x)
    given = layer(x.reshape(4, 2, 1, 1), np.full((4, 1), np.log(level), np.float32))[:, 0]
    np.testing.assert_allclose(given, log_ratio.sum(axis=1) / (1 + (level / 0.4) ** 2), rtol=1e-4)


def test_layers_keep_their_options():
    for layer, options in (
        (RandomFourierFeatures, {"num_features": 5, "scale": 1.7, "seed": 3, "data_mean": [1.0, 2.0]}),
        (NoiseScaling, {"data_std": [1.3, 2.0]}),
        (DataScaling, {"data_std": 1.3, "data_mean": 2.0}),
        (GaussianLogDensity, {"data_std": 1.3}),
    ):
        copy = layer.from_config(layer(**options).get_config())
        assert {name: getattr(copy, name) for name in options} == options


# --- Networks of points ---


@pytest.mark.parametrize(("dim", "num_frequencies"), [(1, 64), (3, 64), (4, 0), (63, 0)])
@pytest.mark.parametrize("conditional", [False, True])
def test_energy_net_returns_one_number_a_point_and_has_waves_in_few_dimensions(dim, num_frequencies, conditional):
    for num_features, expected in ((None, num_frequencies), (0, 0), (3, 3)):
        net = build_energy_net(dim, conditional, (6, 6), num_features=num_features)
        assert net([normal(4, dim), normal(4, 1)] if conditional else normal(4, dim)).shape == (4, 1)
        assert net.output_shape == (None, 1)
        assert units_of(net) == [6, 6, 1]
        assert sum(layer.num_features for layer in layers_of(net, RandomFourierFeatures)) == expected


def test_energy_net_without_its_correction_is_a_normalised_gaussian():
    x = normal(4, 3)
    for level in (None, 0.1, 0.7, 3.0):
        net = build_energy_net(3, level is not None, (5,), num_features=2, data_std=1.5)
        silence_correction(net)
        variance = 1.5**2 + (level or 0.0) ** 2
        expected = stats.multivariate_normal(cov=variance * np.eye(3)).logpdf(x)
        np.testing.assert_allclose(log_density(net, x, level), expected, rtol=1e-5)


def test_generator_starts_as_the_identity_scaled_to_the_data():
    z = normal(500, 2)
    y = build_generator(2, 2, (32, 32), "relu", num_features=8, feature_scale=1.0, data_std=1.7, seed=0)(z)
    assert relative_error(y, 1.7 * z) < 0.2


@pytest.mark.parametrize("build", [build_energy_net, build_generator])
def test_initial_weights_are_a_function_of_the_seed(build):
    first, same, other = (build(widths=(6, 6, 6), num_features=3, seed=seed).get_weights() for seed in (4, 4, 5))
    assert_equal_arrays(first, same)
    random = [weight for weight in first if np.any(weight)]  # biases start at zero
    pairs = [*zip(first, other, strict=True), *itertools.combinations(random, 2)]
    assert not any(np.isin(one, two).any() for one, two in pairs if np.any(one) and one.shape == two.shape)


def test_networks_are_built_in_silence(capsys):
    make_egm("range").compile()
    assert capsys.readouterr() == ("", "")


# --- Data of any units ---

SHIFT, SCALE = np.array([300.0, -2e4, 0.5]), np.array([2.0, 1e3, 0.01])
CORRELATED = normal(2000, 3, seed=7) @ np.array([[1.0, 0.6, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 0.5]])


@pytest.mark.parametrize("num_features", [0, 5])
@double_precision()
def test_networks_built_for_data_are_the_same_in_any_units(num_features):
    # Of all coordinates in one unit, the noise too: the log density of the other units, and the points in them.
    for level in (None, 0.3):
        options = {"noise_conditional": level is not None, "widths": (6,), "num_features": num_features, "seed": 1}
        values = []
        for shift, scale in ((0.0, 1.0), (1e-3 * SHIFT, 1e-3), (1e6, 1e4)):
            net = build_energy_net(data=shift + scale * CORRELATED, **options)
            values.append(log_density(net, shift + scale * CORRELATED[:9], level and level * scale))
        for other in values[1:]:
            np.testing.assert_allclose(other - other[0], values[0] - values[0][0], rtol=1e-6, atol=1e-6)
    z = normal(9, 3, seed=2)
    y = build_generator(3, data=CORRELATED, widths=(6,), num_features=4)(z)
    moved = build_generator(3, data=SHIFT + SCALE * CORRELATED, widths=(6,), num_features=4)(z)
    np.testing.assert_allclose(moved, SHIFT + SCALE * y.numpy(), rtol=1e-6)


@double_precision()
def test_networks_built_for_data_start_at_their_gaussian():
    data, units = SHIFT + SCALE * CORRELATED, np.outer(SCALE, SCALE)
    mean, covariance = data.mean(axis=0), np.cov(data, rowvar=False, bias=True)
    for level in (None, 0.2, 500.0):
        net = build_energy_net(data=data, noise_conditional=level is not None, widths=(6,))
        silence_correction(net)
        scaled = (covariance + (level or 0.0) ** 2 * np.eye(3)) / units
        expected = stats.multivariate_normal(mean / SCALE, scaled).logpdf(data[:9] / SCALE) - np.log(SCALE).sum()
        np.testing.assert_allclose(log_density(net, data[:9], level), expected, rtol=0.05 if level is None else 1e-7)
    generator = build_generator(3, data=data, widths=(6,), num_features=4)
    silence_correction(generator)
    y = generator(normal(200_000, 3)).numpy()
    np.testing.assert_allclose((y.mean(axis=0) - mean) / SCALE, 0, atol=0.01)
    np.testing.assert_allclose(np.cov(y, rowvar=False) / units, covariance / units, atol=0.02)


def test_data_that_are_no_base_for_a_network_are_refused():
    for build in (build_energy_net, build_generator):
        with pytest.raises(ValueError, match="data must be points that differ, got 5 alike"):
            build(data=np.ones((5, 2)))
        with pytest.raises(ValueError, match=r"data must have shape \(n, 3\), got \(2000, 2\)"):
            build(dim=3, data=CORRELATED[:, :2])
        with pytest.raises(ValueError, match=r"data_std is that of data, where data are given; got 1\.5"):
            build(data=CORRELATED, data_std=1.5)
    constant = np.column_stack([CORRELATED, np.full(2000, 7.0)])
    assert np.isfinite(log_density(build_energy_net(data=constant), constant[:9])).all()


SMALL = {"widths": (6, 6), "num_features": 3, "feature_scale": 1.0, "data_std": 2.0}
CHANGES = {"num_features": 5, "feature_scale": 2.0, "data_std": 3.0, "widths": (6,), "seed": 1}
OF_IMAGES = {"images": IMAGES, "widths": (5, 5)}
OTHER_IMAGES = {"images": IMAGES + 0.1, "widths": (4,), "seed": 1}
OF_NETS = {"activation": "tanh", "separate_channels": True}


@pytest.mark.parametrize(
    ("build", "options", "changes", "inputs"),
    [
        (build_energy_net, SMALL, CHANGES | {"activation": "silu"}, normal(4, 2)),
        (build_generator, SMALL, CHANGES | {"activation": "tanh", "num_jumps": 2}, normal(4, 2)),
        (build_image_energy_net, OF_IMAGES, OTHER_IMAGES | OF_NETS, [normal(4, 4, 3, 2), normal(4, 1)]),
        (build_image_generator, OF_IMAGES | {"latent_dim": 3}, OTHER_IMAGES, normal(4, 3)),
    ],
)
def test_every_option_of_a_network_matters(build, options, changes, inputs):
    reference = build(**options)(inputs)
    for name, value in changes.items():
        assert not np.allclose(build(**options | {name: value})(inputs), reference), name


# --- Networks of images ---


@pytest.mark.parametrize("separate_channels", [False, True])
def test_image_energy_net_starts_at_the_gaussian_of_the_data_and_the_mixture_of_its_pixels(separate_channels):
    # Without the correction, it is the log density of N(mean, covariance + noise_std^2 I), and that of the mixture.
    net = build_image_energy_net(IMAGES, (5,), separate_channels=separate_channels)
    assert units_of(net) == [128, 64, 5, 1]
    silence_correction(net)
    flat = IMAGES.reshape(50, -1)
    mean, covariance = flat.mean(axis=0), np.cov(flat, rowvar=False)
    if separate_channels:  # they have one mean and covariance, and nothing to do with each other
        flat = IMAGES.transpose(0, 3, 1, 2).reshape(100, -1)
        mean, covariance = np.repeat(flat.mean(axis=0), 2), np.kron(np.cov(flat, rowvar=False), np.eye(2))
    x = (IMAGES[:6] + normal(6, 4, 3, 2)).astype(np.float32)
    levels = np.geomspace(0.5, 3, 6, dtype=np.float32)
    expected = [
        stats.multivariate_normal(mean, covariance + level**2 * np.eye(24)).logpdf(image.ravel())
        for image, level in zip(x, levels, strict=True)
    ]
    (mixture,) = layers_of(net, PixelMixture)
    expected += mixture(x, np.log(levels)[:, None]).numpy()[:, 0]
    np.testing.assert_allclose(net([x, np.log(levels)[:, None]])[:, 0], expected, rtol=1e-2)


@pytest.mark.parametrize(("separate_channels", "parts_that_change"), [(False, [True]), (True, [False, True])])
def test_channels_meet_in_the_windows_or_after_the_first_wide_layer(separate_channels, parts_that_change):
    net = build_image_energy_net(IMAGES, (5, 4), separate_channels=separate_channels)
    layers = layers_of(net, keras.layers.Dense)
    level, clean = np.zeros((1, 1), np.float32), IMAGES[:1].astype(np.float32)
    changed = clean + np.array([0, 1], np.float32)  # the second channel alone
    for layer in layers[:3]:
        look = keras.Model(net.inputs, layer.output)
        units = np.reshape(look([changed, level]) != look([clean, level]), (len(parts_that_change), -1))
        assert units.any(axis=-1).tolist() == parts_that_change
    assert layers[3].input.shape == (None, 5 * len(parts_that_change) + 1)  # all channels, and the level


def test_pixels_have_their_shares_of_black_and_white():
    images = np.array([[-1, -1, 0.1], [-0.95, 1, -0.2], [-1, 0.97, 0.5], [-1, 1, 1]], np.float32).reshape(4, 3, 1, 1)
    (mixture,) = layers_of(build_image_energy_net(images, (5,)), PixelMixture)
    shares, means, variances = mixture.get_weights()
    expected = np.array([[1, 0.25, 0], [0, 0.75, 0.25], [0, 0, 0.75]])
    np.testing.assert_allclose(shares[..., 0, 0], expected, atol=2e-3)
    np.testing.assert_allclose(means, [-1, 1, 0])
    np.testing.assert_allclose(np.sqrt(variances), [0.04, 0.04, 3**-0.5], rtol=1e-5)


def test_pixels_that_never_change_have_a_width():
    images = np.where(np.arange(3)[:, None] == 1, -1.0, IMAGES)
    assert np.isfinite(log_density(build_image_energy_net(images, (5,)), images, 1e-4)).all()


def test_image_generator_starts_as_the_gaussian_of_the_widest_directions():
    y = np.reshape(build_image_generator(IMAGES, 24, widths=(7,))(normal(20_000, 24, seed=2)), (20_000, -1))
    flat = IMAGES.reshape(50, -1)
    assert relative_error(y.mean(axis=0), flat.mean(axis=0)) < 0.1  # the correction is small, not zero
    assert relative_error(np.cov(y, rowvar=False), np.cov(flat, rowvar=False)) < 0.1
    widest = np.cov(np.reshape(build_image_generator(IMAGES, 2)(normal(20_000, 2, seed=2)), (20_000, -1)), rowvar=False)
    np.testing.assert_allclose(np.trace(widest), np.linalg.eigvalsh(np.cov(flat, rowvar=False))[-2:].sum(), rtol=0.1)


def test_pixels_beyond_those_of_the_images_come_back():
    generator = build_image_generator(IMAGES, 3, (7,))
    inside = keras.Model(generator.input, layers_of(generator, keras.layers.Add)[0].output)
    z = 5 * normal(100, 3)
    pixels = inside(z).numpy().reshape(100, 4, 3, 2)
    assert pixels.min() < IMAGES.min() and pixels.max() > IMAGES.max()
    clipped = np.clip(pixels, IMAGES.min(), IMAGES.max())
    np.testing.assert_allclose(generator(z), 0.05 * pixels + 0.95 * clipped, rtol=1e-4, atol=1e-5)
