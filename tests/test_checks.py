"""Arguments that are refused, with the value given and the values allowed."""

import itertools
import re
from functools import partial

import keras
import numpy as np
import pytest
from small_models import egm_parts, identity_generator, make_dde, normal, zero_net

from energy_models import DDE, EGM, build_energy_net, build_generator, build_image_energy_net, build_image_generator

NAN, INFINITY = float("nan"), float("inf")
NOISE = [0, -1, NAN, INFINITY, "0.1", None, True, (1.0, 0.1), (0.2, 0.2), (0.1, 0.1, 0.2), (0.0, 1.0), (0.1,), ()]
NOISE += [np.ones((2, 2)), np.array(0.1)]
SEEDS = [-1, 1.5, True, 2**31, "0"]
INTEGERS = [0, -1, 2.5, True, "5", None]
SCALES = [0, -1.0, NAN, INFINITY, "1", None]
INTEGER, POSITIVE = "an integer of at least 1", "a positive finite number"
SEED = "an integer of at least 0 and less than 2147483648"


def new_egm(**options):
    return EGM(*egm_parts(), **options)


def sample(n_samples=3, seed=None):
    return new_egm().sample(n_samples, seed=seed)


# What is called, the argument, what it must be, the values.
REFUSED = [
    (partial(DDE, zero_net(2)), "noise_std", r"a positive finite number, or a pair \(low, high\) .*", NOISE),
    (partial(make_dde, "range"), "dual_weight", "a finite number of at least 0", [-1, NAN, "1"]),
    (new_egm, "dde_steps", INTEGER, INTEGERS),
    (new_egm, "latents_per_point", INTEGER, INTEGERS),
    (new_egm, "real_steps", INTEGER, INTEGERS[:-1]),  # None is allowed, too
    (new_egm, "average_decay", "a finite number of at least 0 and less than 1", [-0.1, 1, 1.5, NAN, "0.9", None]),
    (new_egm, "level_power", "a finite number of at least 0", [-1, NAN, "2", None]),
    (sample, "n_samples", INTEGER, INTEGERS),
    (build_energy_net, "num_features", "an integer of at least 0", [-1, 2.5, True, False]),  # None is allowed, too
    (build_generator, "num_features", INTEGER, INTEGERS),
    (build_generator, "latent_dim", INTEGER, INTEGERS),
]
for build in (build_energy_net, build_generator):
    REFUSED += [
        (build, "dim", INTEGER, INTEGERS[:-1]),  # None is allowed here and for data_std, too
        (build, "widths", "a sequence of integers", [4]),
        (lambda widths, build=build: build(widths=(4, widths)), "widths", INTEGER, INTEGERS),
        (build, "feature_scale", POSITIVE, SCALES),
        (build, "data_std", POSITIVE, SCALES[:-1]),
    ]
for call in (partial(DDE, zero_net(2), 0.1), new_egm, sample, build_energy_net, build_generator):
    REFUSED.append((call, "seed", SEED, SEEDS))


@pytest.mark.parametrize(("call", "name", "needed", "values"), REFUSED)
def test_bad_values_are_refused(call, name, needed, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{name}(, .*,)? must be {needed}[,;] got {re.escape(repr(value))}"):
            call(**{name: value})


@pytest.mark.parametrize(
    "noise_std", [1, np.float32(0.5), np.float64(0.5), (0.1, 1), [0.1, 1.0], np.array([0.1, 1.0])], ids=repr
)
def test_noise_of_any_number_type_is_accepted(noise_std):
    conditional = np.ndim(noise_std) == 1
    dde = DDE(zero_net(2, conditional), noise_std)
    assert dde.noise_range == pytest.approx(tuple(noise_std) if conditional else (noise_std, noise_std))
    assert dde.noise_conditional == conditional


@pytest.mark.parametrize(
    ("kind", "levels", "message"),
    [
        ("range", [0.1, 1.6, 9.0, 0, -1, NAN, [0.3, 0.3, 9.0]], r"within \[0\.2, 1\.5\], .*; got"),
        ("fixed", [0.5], r"within \[0\.4, 0\.4\], .*; got"),
        ("range", [np.array([0.3, 0.5])], r"a number or one a point, \(3,\); got .* of shape \(2,\)"),
        ("range", [np.array([[0.3, 0.5, 0.7]])], r"a number or one a point, \(3,\); got .* of shape \(1, 3\)"),
        ("range", ["0.3"], r"a number or one a point, \(3,\); got .* of shape \(\)"),
    ],
)
def test_bad_levels_are_refused_by_every_method(kind, levels, message):
    dde = make_dde(kind)
    for method, level in itertools.product((dde, dde.log_density, dde.score, dde.denoise), levels):
        with pytest.raises(ValueError, match=f"noise_std must be {message}") as error:
            method(normal(3, 3), noise_std=level)
        assert repr(level) in str(error.value)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (3, 3, 1)], ids=repr)
def test_points_of_another_shape_are_refused(shape):
    dde = make_dde("fixed")
    dde.compile(run_eagerly=True)
    methods = [dde, dde.log_density, dde.score, dde.denoise]
    methods += [lambda x: dde.fit(x, verbose=0), lambda x: dde.evaluate(x, verbose=0)] if len(shape) > 1 else []
    for method in methods:
        with pytest.raises(ValueError, match=r"shape \((batch|n), 3\), got \("):
            method(np.zeros(shape, np.float32))


# --- Networks that do not fit ---

NO_NETS = [None, "net", np.square, make_dde]


@pytest.mark.parametrize(
    ("net", "noise_std", "message"),
    [
        (keras.Sequential([keras.Input((2,)), keras.layers.Dense(10)]), 0.1, r"\(batch, 1\); got shape \(None, 10\)"),
        (zero_net(2), (0.1, 1.0), r"must have 2 input\(s\).*log\(noise_std\).*got 1"),
        (zero_net(2, True), 0.1, r"must have 1 input\(s\).*got 2"),
        *((net, 0.1, r"net must be a keras\.Model, got") for net in NO_NETS),
    ],
)
def test_networks_that_do_not_fit_are_refused(net, noise_std, message):
    with pytest.raises(ValueError, match=message):
        DDE(net, noise_std)


def test_network_with_ten_outputs_is_refused_when_it_is_built():
    dde = DDE(keras.Sequential([keras.layers.Dense(10)]), 0.1)
    for method in (dde, dde.log_density):
        with pytest.raises(ValueError, match=r"shape \(batch, 1\); got shape \(4, 10\)"):
            method(normal(4, 2))


def test_parts_that_do_not_fit_each_other_are_refused():
    dde, other, generator = egm_parts()
    unknown, of_images = keras.Sequential([keras.layers.Dense(1)]), (make_dde("images"), make_dde("images"))
    for parts, message in (
        *(((dde, other, net), r"generator must be a keras\.Model, got") for net in NO_NETS),
        *(((net, other, generator), "dde_real must be a DDE, got") for net in NO_NETS),
        *(((dde, net, generator), "dde_fake must be a DDE, got") for net in NO_NETS),
        (egm_parts(dim=3), r"shape \(batch, 2\) to fit dde_real, got \(batch, 3\)"),
        ((*of_images, identity_generator(16)), r"shape \(batch, 4, 4, 1\) to fit dde_real, got \(batch, 16\)"),
        ((dde, DDE(zero_net(3), 0.1), generator), r"shape \(batch, 3\) to fit dde_fake, got \(batch, 2\)"),
        (egm_parts(noise_stds=(0.1, 0.2)), r"the same noise_std, got 0\.1 and 0\.2"),
        ((dde, dde, generator), "two DDEs with a network each, got one used twice"),
        ((dde, DDE(dde.net, 0.1), generator), "two DDEs with a network each, got one used twice"),
        ((dde, DDE(unknown, 0.1), generator), "shapes of dde_fake must be known"),
        ((dde, other, unknown), "shapes of generator must be known"),
    ):
        with pytest.raises(ValueError, match=message):
            EGM(*parts)


IMAGES = normal(5, 4, 3, 2)
IMAGE_NET = partial(build_image_energy_net, images=IMAGES)
IMAGE_GENERATOR = partial(build_image_generator, images=IMAGES, latent_dim=3)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (IMAGE_NET, {"images": IMAGES[0]}, r"images must be finite numbers of shape \(n, .* got .* shape \(4, 3, 2\)"),
        (IMAGE_NET, {"images": IMAGES[:1]}, r"not all alike, got float\d+ of shape \(1, 4, 3, 2\)"),
        (IMAGE_NET, {"images": IMAGES[:0]}, r"not all alike, got float\d+ of shape \(0, 4, 3, 2\)"),
        (IMAGE_NET, {"images": IMAGES[[0, 0, 0]]}, r"not all alike, got float\d+ of shape \(3, 4, 3, 2\)"),
        (IMAGE_NET, {"images": np.full((2, 4, 3, 2), NAN)}, "images must be finite numbers"),
        (IMAGE_NET, {"widths": 4}, "widths must be a sequence of integers, got 4"),
        (IMAGE_GENERATOR, {"images": IMAGES[0]}, "images must be finite numbers"),
        (IMAGE_GENERATOR, {"latent_dim": 25}, "latent_dim must be an integer of at least 1 and less than 25, got 25"),
        (IMAGE_GENERATOR, {"widths": (0,)}, "each of widths must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_of_image_networks_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
