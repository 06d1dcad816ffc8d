import itertools

import keras
import numpy as np
import pytest
from scipy import stats
from small_models import assert_equal_arrays, double_precision, make_egm, normal, relative_error

from egm_dde.image_networks import (
    PixelMixture,
    ScoreScaling,
    Windows,
    build_image_energy_net,
    build_image_generator,
)
from egm_dde.networks import (
    DataScaling,
    GaussianLogDensity,
    NoiseScaling,
    RandomFourierFeatures,
    build_energy_net,
    build_generator,
)

IMAGES = normal(50, 4, 3, 2, seed=3) * np.linspace(0.5, 2, 24).reshape(4, 3, 2) + 1


def sizes_of(net, layer_class, size):
    return [getattr(layer, size) for layer in net.layers if isinstance(layer, layer_class)]


def last_dense(net):
    return [layer for layer in net.layers if isinstance(layer, keras.layers.Dense) and layer.trainable][-1]


# --- Layers ---


def test_fourier_features_equal_their_formula():
    layer = RandomFourierFeatures(num_features=2000, scale=1.7, seed=3)
    x = normal(4, 2)
    features = layer(x).numpy()
    assert layer.trainable_variables == []
    frequencies = layer.get_weights()[0]
    assert frequencies.shape == (2, 2000)
    assert stats.kstest(frequencies.ravel(), stats.norm(scale=1.7).cdf).pvalue > 1e-3
    expected = np.concatenate([x, np.sin(x @ frequencies), np.cos(x @ frequencies)], axis=1)
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_fourier_features_of_a_level_are_blurred_by_its_noise():
    layer = RandomFourierFeatures(num_features=6, scale=1.2, seed=3)
    x, levels = normal(3, 2), np.array([0.1, 0.5, 1.5])
    features = layer(x, np.log(levels, dtype=np.float32)[:, None]).numpy()
    frequencies = layer.get_weights()[0]  # (2, 6)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    noise = levels[:, None, None] * np.linalg.norm(frequencies, axis=0)[:, None] * nodes  # (3, 6, 80), of the phase
    phases = (x @ frequencies)[:, :, None] + noise
    expected = [np.average(wave(phases), axis=-1, weights=weights) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(features, np.concatenate([x, *expected], axis=1), atol=1e-5)


def test_noise_scaling_makes_points_equally_wide():
    x = 1.7 * normal(5000, 3)
    levels = np.geomspace(0.1, 10, 5000, dtype=np.float32)[:, None]
    noisy = x + levels * normal(5000, 3, seed=1)
    scaled = NoiseScaling(1.7)(noisy, np.log(levels))
    np.testing.assert_allclose(scaled, noisy / np.hypot(1.7, levels), rtol=1e-5)
    np.testing.assert_allclose(np.std(np.split(scaled.numpy(), 5), axis=(1, 2)), 1, rtol=0.05)
    np.testing.assert_allclose(NoiseScaling(1.7)(x), x / 1.7, rtol=1e-5)


def gaussian_log_density(x, variance):
    return stats.multivariate_normal(cov=variance * np.eye(x.shape[-1])).logpdf(x)


def test_base_measure_is_a_normalised_gaussian():
    layer = GaussianLogDensity(data_std=1.5)
    x, levels = normal(4, 3), np.array([0.1, 0.5, 1.0, 3.0])
    np.testing.assert_allclose(layer(x)[:, 0], gaussian_log_density(x, 1.5**2), rtol=1e-5)
    expected = [gaussian_log_density(y, 1.5**2 + s**2) for y, s in zip(x, levels, strict=True)]
    np.testing.assert_allclose(layer(x, np.log(levels, dtype=np.float32)[:, None])[:, 0], expected, rtol=1e-5)


def test_score_scaling_follows_the_slope_of_a_log_density():
    hidden, levels = normal(4, 3), np.array([[0.1], [0.5], [1.0], [30.0]], np.float32)
    np.testing.assert_allclose(ScoreScaling(1.7)(hidden, np.log(levels)), hidden * np.hypot(1, 1.7 / levels), rtol=1e-5)


def test_windows_overlap_by_half_and_pass_the_edges():
    images = normal(2, 7, 8, 3)  # with margins of 2 and 3 rows, 2 and 2 columns around them
    padded = np.pad(images, [(0, 0), (2, 3), (2, 2), (0, 0)])
    windows = Windows()(images).numpy()
    assert windows.shape == (2, 4, 8 * 8 * 3)
    for window, (row, column) in zip(windows.swapaxes(0, 1), itertools.product((0, 4), (0, 4)), strict=True):
        expected = padded[:, row : row + 8, column : column + 8].reshape(2, -1)
        np.testing.assert_array_equal(np.sort(window), np.sort(expected))


def test_pixel_mixture_is_the_log_ratio_to_the_gaussian_of_the_same_moments():
    layer, level = PixelMixture(data_std=0.8), 0.3
    x = normal(4, 2, 1, 1)
    layer.build(x.shape)
    shares, means, variances = np.array([[0.7, 0.2], [0.1, 0.5], [0.2, 0.3]]), [-1.0, 1.0, 0.2], [0.01, 0.02, 0.3]
    layer.set_weights([shares.reshape(3, 2, 1, 1), np.array(means), np.array(variances)])
    log_ratio = 0
    for pixel in range(2):
        values, weights = x[:, pixel, 0, 0], shares[:, pixel]
        mean = weights @ means
        variance = weights @ (np.square(means) + variances) - mean**2 + level**2
        densities = [stats.norm(m, np.sqrt(v + level**2)).pdf(values) for m, v in zip(means, variances, strict=True)]
        log_ratio += np.log(weights @ densities) - stats.norm(mean, np.sqrt(variance)).logpdf(values)
    expected = log_ratio / (1 + (level / 0.4) ** 2)
    np.testing.assert_allclose(layer(x, np.full((4, 1), np.log(level), np.float32))[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (RandomFourierFeatures, {"num_features": 5, "scale": 1.7, "seed": 3, "data_mean": [1.0, 2.0]}),
        (NoiseScaling, {"data_std": [1.3, 2.0]}),
        (DataScaling, {"data_std": 1.3, "data_mean": 2.0}),
        (GaussianLogDensity, {"data_std": 1.3}),
    ],
)
def test_layers_keep_their_options(layer, options):
    copy = layer.from_config(layer(**options).get_config())
    assert {name: getattr(copy, name) for name in options} == options


# --- Networks of points ---


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("noise_conditional", [False, True])
def test_energy_net_returns_one_number_a_point(dim, noise_conditional):
    net = build_energy_net(dim, noise_conditional, (6, 6), num_features=3)
    inputs = [normal(4, dim), normal(4, 1)] if noise_conditional else normal(4, dim)
    assert net(inputs).shape == (4, 1)
    assert net.output_shape == (None, 1)
    assert sizes_of(net, keras.layers.Dense, "units") == [6, 6, 1]


def test_energy_net_without_its_last_layer_is_the_base_measure():
    net = build_energy_net(3, True, (5,), num_features=2, data_std=1.5)
    last_dense(net).set_weights([np.zeros((5, 1))])
    x = normal(4, 3)
    log_density = net([x, np.full((4, 1), np.log(0.7), np.float32)])[:, 0]
    np.testing.assert_allclose(log_density, gaussian_log_density(x, 1.5**2 + 0.7**2), rtol=1e-5)


@pytest.mark.parametrize(("dim", "num_frequencies"), [(2, 64), (3, 64), (4, 0), (63, 0)])
def test_waves_are_left_out_in_many_dimensions(dim, num_frequencies):
    for num_features in (None, num_frequencies):
        net = build_energy_net(dim, True, (4,), num_features=num_features)
        found = sizes_of(net, RandomFourierFeatures, "num_features")
        assert found == ([num_frequencies] if num_frequencies else [])
        assert net([normal(5, dim), normal(5, 1)]).shape == (5, 1)


@pytest.mark.parametrize(("latent_dim", "dim"), [(1, 1), (2, 2), (4, 3)])
def test_generator_maps_latents_to_points(latent_dim, dim):
    generator = build_generator(latent_dim, dim, (6, 6), num_features=3)
    assert generator(normal(4, latent_dim)).shape == (4, dim)
    assert sizes_of(generator, keras.layers.Dense, "units") == [6, 6, dim]


def test_generator_starts_as_the_identity_scaled_to_the_data():
    z = normal(500, 2)
    y = build_generator(2, 2, (32, 32), "relu", num_features=8, feature_scale=1.0, data_std=1.7, seed=0)(z)
    assert relative_error(y, 1.7 * z) < 0.2


@pytest.mark.parametrize("build", [build_energy_net, build_generator])
def test_initial_weights_are_a_function_of_the_seed(build):
    first, same, other = (build(widths=(6, 6, 6), num_features=3, seed=seed).get_weights() for seed in (4, 4, 5))
    assert_equal_arrays(first, same)
    for one, two in zip(first, other, strict=True):
        assert not np.any(one) or not np.isin(one, two).any()  # biases start at zero
    for one, two in itertools.combinations(first, 2):
        if one.shape == two.shape and np.any(one):
            assert not np.isin(one, two).any()


def test_networks_are_built_in_silence(capsys):
    build_energy_net(noise_conditional=True, widths=(4,), num_features=2)
    build_generator(widths=(4,), num_features=2)
    make_egm().compile()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


# --- Data of any units ---

SHIFT, SCALE = np.array([300.0, -2e4, 0.5]), np.array([2.0, 1e3, 0.01])
CORRELATED = normal(2000, 3, seed=7) @ np.array([[1.0, 0.6, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 0.5]])


def log_density(net, x, level=None):
    return net(x if level is None else [x, np.full((len(x), 1), np.log(level))]).numpy()


@pytest.mark.parametrize("num_features", [0, 5])
@double_precision()
def test_networks_built_for_data_are_the_same_in_any_units(num_features):
    # Of all coordinates in one unit, the noise too: the log density of the other units, and the points in them.
    for level in (None, 0.3):
        options = {"noise_conditional": level is not None, "widths": (6,), "num_features": num_features, "seed": 1}
        values = []
        for shift, scale in ((0.0, 1.0), (1e-3 * SHIFT, 1e-3), (1e6, 1e4)):
            net = build_energy_net(data=shift + scale * CORRELATED, **options)
            values.append(log_density(net, shift + scale * CORRELATED[:9], level and level * scale)[:, 0])
        for other in values[1:]:
            np.testing.assert_allclose(other - other[0], values[0] - values[0][0], rtol=1e-6, atol=1e-6)
    z = normal(9, 3, seed=2)
    y = build_generator(3, data=CORRELATED, widths=(6,), num_features=4)(z)
    moved = build_generator(3, data=SHIFT + SCALE * CORRELATED, widths=(6,), num_features=4)(z)
    np.testing.assert_allclose(moved, SHIFT + SCALE * y.numpy(), rtol=1e-6)


@double_precision()
def test_networks_built_for_data_start_at_their_gaussian():
    data = SHIFT + SCALE * CORRELATED
    mean, covariance = data.mean(axis=0), np.cov(data, rowvar=False, bias=True)
    for level in (None, 0.2, 500.0):
        net = build_energy_net(data=data, noise_conditional=level is not None, widths=(6,))
        last_dense(net).set_weights([np.zeros((6, 1))])
        variance = 0.0 if level is None else level**2
        scaled = (covariance + variance * np.eye(3)) / np.outer(SCALE, SCALE)
        expected = stats.multivariate_normal(mean / SCALE, scaled).logpdf(data[:9] / SCALE) - np.log(SCALE).sum()
        given = log_density(net, data[:9], level)[:, 0]
        np.testing.assert_allclose(given, expected, rtol=0.05 if level is None else 1e-7)
    generator = build_generator(3, data=data, widths=(6,), num_features=4)
    last_dense(generator).set_weights([np.zeros((6, 3)), np.zeros(3)])
    y = generator(normal(200_000, 3)).numpy()
    np.testing.assert_allclose((y.mean(axis=0) - mean) / SCALE, 0, atol=0.01)
    np.testing.assert_allclose(
        np.cov(y, rowvar=False) / np.outer(SCALE, SCALE), covariance / np.outer(SCALE, SCALE), atol=0.02
    )


def test_features_of_data_are_blurred_by_noise_of_their_units():
    # The waves of two coordinates of other widths are damped as if noise had been added and averaged over.
    layer = RandomFourierFeatures(3, 1.2, data_std=[2.0, 0.5], data_mean=[10.0, -3.0])
    x, level = np.float32([[11.0, -3.2]]), 0.3
    noisy = x + level * normal(400_000, 2)
    expected = np.mean(layer(noisy)[:, 2:], axis=0)
    given = layer(x, np.log(np.float32([[level]])))[0, 2:]
    np.testing.assert_allclose(given, expected, atol=3e-3)
    assert np.abs(expected - layer(x)[0, 2:]).max() > 0.02


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


@pytest.mark.parametrize(
    ("build", "options", "changes", "event_shape"),
    [
        (build_energy_net, SMALL, CHANGES | {"activation": "silu"}, (2,)),
        (build_generator, SMALL, CHANGES | {"activation": "tanh"}, (2,)),
        (
            lambda **options: lambda x: build_image_energy_net(**options)([x, normal(4, 1)]),
            {"images": IMAGES, "widths": (5, 5)},
            {"images": IMAGES + 0.1, "widths": (4,), "activation": "tanh", "seed": 1, "separate_channels": True},
            (4, 3, 2),
        ),
        (
            build_image_generator,
            {"images": IMAGES, "latent_dim": 3, "widths": (5, 5)},
            {"images": IMAGES + 0.1, "widths": (4,), "seed": 1},
            (3,),
        ),
    ],
    ids=["energy", "generator", "image energy", "image generator"],
)
def test_every_option_of_a_network_matters(build, options, changes, event_shape):
    reference = build(**options)(normal(4, *event_shape))
    for name, value in changes.items():
        assert not np.allclose(build(**options | {name: value})(normal(4, *event_shape)), reference), name


# --- Networks of images ---


@pytest.mark.parametrize("separate_channels", [False, True])
def test_image_energy_net_starts_at_the_gaussian_of_the_data_and_the_mixture_of_its_pixels(separate_channels):
    # Without the correction, it is the log density of N(mean, covariance + noise_std^2 I), and that of the mixture.
    net = build_image_energy_net(IMAGES, (5,), separate_channels=separate_channels)
    assert sizes_of(net, keras.layers.Dense, "units") == [128, 64, 5, 1]
    last_layer = [layer for layer in net.layers if isinstance(layer, keras.layers.Dense)][-1]
    last_layer.set_weights([np.zeros((128 + 64 + 5 * (1 + separate_channels), 1))])
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
    (mixture,) = (layer for layer in net.layers if isinstance(layer, PixelMixture))
    expected += mixture(x, np.log(levels)[:, None]).numpy()[:, 0]
    np.testing.assert_allclose(net([x, np.log(levels)[:, None]])[:, 0], expected, rtol=1e-2)


@pytest.mark.parametrize(("separate_channels", "parts_that_change"), [(False, [True]), (True, [False, True])])
def test_channels_meet_in_the_windows_or_after_the_first_wide_layer(separate_channels, parts_that_change):
    net = build_image_energy_net(IMAGES, (5, 4), separate_channels=separate_channels)
    layers = [layer for layer in net.layers if isinstance(layer, keras.layers.Dense)]
    level, clean = np.zeros((1, 1), np.float32), IMAGES[:1].astype(np.float32)
    changed = clean + np.array([0, 1], np.float32)  # the second channel alone
    for layer in layers[:3]:
        look = keras.Model(net.inputs, layer.output)
        units = np.reshape(look([changed, level]) != look([clean, level]), (len(parts_that_change), -1))
        assert units.any(axis=-1).tolist() == parts_that_change
    assert layers[3].input.shape == (None, 5 * len(parts_that_change) + 1)  # all channels, and the level


def test_pixels_have_their_shares_of_black_and_white():
    images = np.array([[-1, -1, 0.1], [-0.95, 1, -0.2], [-1, 0.97, 0.5], [-1, 1, 1]], np.float32).reshape(4, 3, 1, 1)
    (mixture,) = (layer for layer in build_image_energy_net(images, (5,)).layers if isinstance(layer, PixelMixture))
    shares, means, variances = mixture.get_weights()
    expected = np.array([[1, 0.25, 0], [0, 0.75, 0.25], [0, 0, 0.75]])
    np.testing.assert_allclose(shares[..., 0, 0], expected, atol=2e-3)
    np.testing.assert_allclose(means, [-1, 1, 0])
    np.testing.assert_allclose(np.sqrt(variances), [0.04, 0.04, 3**-0.5], rtol=1e-5)


def test_pixels_that_never_change_have_a_width():
    images = np.where(np.arange(3)[:, None] == 1, -1.0, IMAGES)
    log_density = build_image_energy_net(images, (5,))([images, np.full((50, 1), -9.0)])
    assert np.isfinite(log_density).all()


def test_image_generator_starts_as_the_gaussian_of_the_widest_directions():
    y = np.reshape(build_image_generator(IMAGES, 24, widths=(7,))(normal(20_000, 24, seed=2)), (20_000, -1))
    flat = IMAGES.reshape(50, -1)
    assert relative_error(y.mean(axis=0), flat.mean(axis=0)) < 0.1  # the correction is small, not zero
    assert relative_error(np.cov(y, rowvar=False), np.cov(flat, rowvar=False)) < 0.1
    widest = np.cov(np.reshape(build_image_generator(IMAGES, 2)(normal(20_000, 2, seed=2)), (20_000, -1)), rowvar=False)
    np.testing.assert_allclose(np.trace(widest), np.linalg.eigvalsh(np.cov(flat, rowvar=False))[-2:].sum(), rtol=0.1)


def test_pixels_beyond_those_of_the_images_come_back():
    generator = build_image_generator(IMAGES, 3, (7,))
    inside = keras.Model(
        generator.input, next(layer for layer in generator.layers if isinstance(layer, keras.layers.Add)).output
    )
    z = 5 * normal(100, 3)
    pixels = inside(z).numpy().reshape(100, 4, 3, 2)
    assert pixels.min() < IMAGES.min() and pixels.max() > IMAGES.max()
    clipped = np.clip(pixels, IMAGES.min(), IMAGES.max())
    np.testing.assert_allclose(generator(z), 0.05 * pixels + 0.95 * clipped, rtol=1e-4, atol=1e-5)
