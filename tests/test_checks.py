"""Arguments that are refused, with the value given and the values allowed."""

import keras
import numpy as np
import pytest
from small_models import egm_parts, identity_generator, make_dde, make_egm, normal, zero_net

from energy_models import DDE, EGM, build_energy_net, build_generator, build_image_energy_net, build_image_generator

NAN, INFINITY = float("nan"), float("inf")
NOISE = [0, -1, NAN, INFINITY, "0.1", None, True, (1.0, 0.1), (0.2, 0.2), (0.1, 0.1, 0.2), (0.0, 1.0), (0.1,), ()]
NOISE += [np.ones((2, 2)), np.array(0.1)]
SEEDS = [-1, 1.5, True, 2**31, "0"]
INTEGERS = [0, -1, 2.5, True, "5", None]
SCALES = [0, -1.0, NAN, INFINITY, "1", None]
LEVELS = [0.1, 1.6, 0, -1, NAN, [0.3, 0.3, 9.0]]
SIZE = "{} must be an integer of at least 1, got "
SCALE = "{} must be a positive finite number, got "
SEED = "seed, unless it is None, must be an integer of at least 0 and less than 2147483648, got "

# What is called, the message, the values.
REFUSED = {
    "noise_std": (
        lambda v: DDE(zero_net(2), v),
        "noise_std must be a positive finite number, or a pair.* got ",
        NOISE,
    ),
    "seed of DDE": (lambda v: DDE(zero_net(2), 0.1, seed=v), SEED, SEEDS),
    "seed of EGM": (lambda v: EGM(*egm_parts(), seed=v), SEED, SEEDS),
    "seed of sample": (lambda v: make_egm().sample(3, seed=v), SEED, SEEDS),
    "seed of energy net": (lambda v: build_energy_net(seed=v), SEED, SEEDS),
    "seed of generator": (lambda v: build_generator(seed=v), SEED, SEEDS),
    "dual_weight": (
        lambda v: make_dde("range", dual_weight=v),
        "dual_weight must be a finite number of at least 0, got ",
        [-1, NAN, "1"],
    ),
    "dde_steps": (lambda v: EGM(*egm_parts(), dde_steps=v), SIZE.format("dde_steps"), INTEGERS),
    "latents_per_point": (
        lambda v: EGM(*egm_parts(), latents_per_point=v),
        SIZE.format("latents_per_point"),
        INTEGERS,
    ),
    "real_steps": (lambda v: EGM(*egm_parts(), real_steps=v), SIZE.format("real_steps"), [0, -1, 2.5, True, "5"]),
    "average_decay": (
        lambda v: EGM(*egm_parts(), average_decay=v),
        "average_decay must be a finite number of at least 0 and less than 1, got ",
        [-0.1, 1, 1.5, NAN, "0.9", None],
    ),
    "level_power": (
        lambda v: EGM(*egm_parts(), level_power=v),
        "level_power must be a finite number of at least 0, got ",
        [-1, NAN, "2", None],
    ),
    "n_samples": (lambda v: EGM(*egm_parts()).sample(v), SIZE.format("n_samples"), INTEGERS),
    "level": (
        lambda v: make_dde("range").log_density(normal(3, 3), noise_std=v),
        r"noise_std must be within \[0\.2, 1\.5\].* got ",
        LEVELS,
    ),
    "latent_dim": (lambda v: build_generator(latent_dim=v), SIZE.format("latent_dim"), INTEGERS),
    "features of energy net": (
        lambda v: build_energy_net(num_features=v),
        "num_features, .* must be an integer of at least 0, got ",
        [-1, 2.5, True, False],  # None is allowed, too
    ),
    "features of generator": (
        lambda v: build_generator(num_features=v),
        SIZE.format("num_features"),
        INTEGERS,
    ),
}
for build in (build_energy_net, build_generator):
    REFUSED |= {
        f"dim of {build.__name__}": (lambda v, build=build: build(dim=v), SIZE.format("dim"), INTEGERS),
        f"width of {build.__name__}": (
            lambda v, build=build: build(widths=(4, v)),
            SIZE.format("each of widths"),
            INTEGERS,
        ),
        f"widths of {build.__name__}": (
            lambda v, build=build: build(widths=v),
            "widths must be a sequence of integers, got ",
            [4],
        ),
    } | {
        f"{name} of {build.__name__}": (
            lambda v, build=build, name=name: build(**{name: v}),
            SCALE.format(name),
            SCALES,
        )
        for name in ("feature_scale", "data_std")
    }
CASES = [
    pytest.param(use, message, value, id=f"{name}: {value!r}")
    for name, (use, message, values) in REFUSED.items()
    for value in values
]


@pytest.mark.parametrize(("use", "message", "value"), CASES)
def test_bad_values_are_refused(use, message, value):
    with pytest.raises(ValueError, match=message) as caught:
        use(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "noise_std", [1, np.float32(0.5), np.float64(0.5), (0.1, 1), [0.1, 1.0], np.array([0.1, 1.0])], ids=repr
)
def test_noise_of_any_number_type_is_accepted(noise_std):
    conditional = np.ndim(noise_std) == 1
    dde = DDE(zero_net(2, conditional), noise_std)
    assert dde.noise_range == pytest.approx(tuple(noise_std) if conditional else (noise_std, noise_std))
    assert dde.noise_conditional == conditional


@pytest.mark.parametrize(
    ("kind", "noise_std", "message"),
    [
        ("range", 9.0, r"within \[0\.2, 1\.5\].*got 9\.0"),
        ("fixed", 0.5, r"within \[0\.4, 0\.4\].*got 0\.5"),
        ("range", np.array([0.3, 0.5]), r"must be a number or one a point, \(3,\); got .* of shape \(2,\)"),
        ("range", np.array([[0.3, 0.5, 0.7]]), r"must be a number or one a point, \(3,\); got .* of shape \(1, 3\)"),
        ("range", "0.3", r"must be a number or one a point, \(3,\); got '0.3' of shape"),
    ],
)
def test_bad_levels_are_refused_by_every_method(kind, noise_std, message):
    dde = make_dde(kind)
    for method in (dde, dde.log_density, dde.score, dde.denoise):
        with pytest.raises(ValueError, match=message):
            method(normal(3, 3), noise_std=noise_std)


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


def test_network_with_ten_outputs_is_refused():
    with pytest.raises(ValueError, match=r"shape \(batch, 1\); got shape \(None, 10\)"):
        DDE(keras.Sequential([keras.Input((2,)), keras.layers.Dense(10)]), 0.1)
    not_yet_built = DDE(keras.Sequential([keras.layers.Dense(10)]), 0.1)
    for method in (not_yet_built, not_yet_built.log_density):
        with pytest.raises(ValueError, match=r"shape \(batch, 1\); got shape \(4, 10\)"):
            method(normal(4, 2))


def test_network_that_does_not_fit_the_noise_is_refused():
    with pytest.raises(ValueError, match=r"must have 2 input\(s\).*log\(noise_std\).*got 1"):
        DDE(zero_net(2), (0.1, 1.0))
    with pytest.raises(ValueError, match=r"must have 1 input\(s\).*got 2"):
        DDE(zero_net(2, True), 0.1)


@pytest.mark.parametrize(
    "net", [None, "net", np.square, make_dde], ids=["None", "text", "function of NumPy", "function"]
)
def test_networks_that_are_none_are_refused(net):
    with pytest.raises(ValueError, match=r"net must be a keras\.Model, got"):
        DDE(net, 0.1)
    dde, other, generator = egm_parts()
    for parts, message in (
        ((dde, other, net), r"generator must be a keras\.Model, got"),
        ((net, other, generator), "dde_real must be a DDE, got"),
        ((dde, net, generator), "dde_fake must be a DDE, got"),
    ):
        with pytest.raises(ValueError, match=message):
            EGM(*parts)


def test_parts_that_do_not_fit_each_other_are_refused():
    dde, other, generator = egm_parts()
    unknown = keras.Sequential([keras.layers.Dense(1)])
    for parts, message in (
        (egm_parts(dim=3), r"shape \(batch, 2\) to fit dde_real, got \(batch, 3\)"),
        (
            (make_dde("images"), make_dde("images"), identity_generator(16)),
            r"shape \(batch, 4, 4, 1\) to fit dde_real, got \(batch, 16\)",
        ),
        ((dde, DDE(zero_net(3), 0.1), generator), r"shape \(batch, 3\) to fit dde_fake, got \(batch, 2\)"),
        (egm_parts(noise_stds=(0.1, 0.2)), r"the same noise_std, got 0\.1 and 0\.2"),
        ((dde, dde, generator), "two DDEs with a network each, got one used twice"),
        ((dde, DDE(dde.net, 0.1), generator), "two DDEs with a network each, got one used twice"),
        ((dde, DDE(unknown, 0.1), generator), "shapes of dde_fake must be known"),
        ((dde, other, unknown), "shapes of generator must be known"),
    ):
        with pytest.raises(ValueError, match=message):
            EGM(*parts)


IMAGE_NET = "image energy net"
IMAGES = normal(5, 4, 3, 2)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (IMAGE_NET, {"images": IMAGES[0]}, r"images must be finite numbers of shape \(n, .* got .* shape \(4, 3, 2\)"),
        (IMAGE_NET, {"images": IMAGES[:1]}, r"not all alike, got float\d+ of shape \(1, 4, 3, 2\)"),
        (IMAGE_NET, {"images": IMAGES[:0]}, r"not all alike, got float\d+ of shape \(0, 4, 3, 2\)"),
        (IMAGE_NET, {"images": IMAGES[[0, 0, 0]]}, r"not all alike, got float\d+ of shape \(3, 4, 3, 2\)"),
        (IMAGE_NET, {"images": np.full((2, 4, 3, 2), NAN)}, "images must be finite numbers"),
        (IMAGE_NET, {"widths": 4}, "widths must be a sequence of integers, got 4"),
        ("generator", {"images": IMAGES[0]}, "images must be finite numbers"),
        ("generator", {"latent_dim": 25}, "latent_dim must be an integer of at least 1 and less than 25, got 25"),
        ("generator", {"widths": (0,)}, "each of widths must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_of_image_networks_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        if build == IMAGE_NET:
            build_image_energy_net(**{"images": IMAGES} | options)
        else:
            build_image_generator(**{"images": IMAGES, "latent_dim": 3} | options)
