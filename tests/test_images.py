"""The recipe of images, their measures, and the sheets that show what is measured."""

import imageio.v3 as iio
import keras
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_examples import EXAMPLES

from energy_models import EGM
from image_data import load_images
from image_metrics import class_shares, classify, draw_sheet, frechet_distance, measure, train_classifier
from image_models import Recipe, build_stack_generator, measure_scales, train_density, train_generator


def classifier_by_brightness():
    """A classifier of images (n, 2, 2, 1) by how bright they are, from 0 to 9, with a layer of features."""
    classifier = keras.Sequential(
        [keras.Input((2, 2, 1)), keras.layers.Flatten(name="features"), keras.layers.Dense(10)]
    )
    steepness = 400.0  # -(mean - k / 10)^2, of which the square of the mean is common to all classes
    classes = np.arange(10) / 10
    classifier.layers[-1].set_weights([np.full((4, 1), 0.25) * 2 * steepness * classes, -steepness * classes**2])
    return classifier


def test_classes_are_counted_and_doubtful_ones_found():
    brightness = np.array([0.1, 0.1, 0.9, 0.45])
    x = np.broadcast_to(brightness[:, None, None, None], (4, 2, 2, 1)).astype(np.float32)
    labels, confidence = classify(classifier_by_brightness(), x)
    assert labels.tolist()[:3] == [1, 1, 9]
    assert (confidence[:3] > 0.9).all() and confidence[3] == pytest.approx(0.5, abs=0.01)
    assert class_shares(labels[:3])[[1, 9]] == pytest.approx([2 / 3, 1 / 3])


def test_stacks_have_a_class_for_each_three():
    x = np.full((2, 2, 2, 3), [0.1, 0.9, 0.2], np.float32)
    labels, _ = classify(classifier_by_brightness(), x)
    assert labels.tolist() == [192, 192]
    shares = class_shares(labels, 3)
    assert shares.sum() == pytest.approx(1) and shares[192] == pytest.approx(1 / 27)


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    x = np.random.default_rng(0).standard_normal((2000, 2))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # mean 0 and covariance I
    assert frechet_distance(x, 3 * x + [1, 2]) == pytest.approx(1 + 4 + 2 * (3 - 1) ** 2)


def test_images_that_were_trained_on_are_perfect():
    x = np.random.default_rng(0).uniform(size=(300, 2, 2, 1)).astype(np.float32)
    classifier = classifier_by_brightness()
    row = measure(classifier, x, x, classify(classifier, x)[0])
    assert row["divergence"] == row["distance"] == 0 and row["frechet"] == pytest.approx(0, abs=1e-3)
    assert row["precision"] == row["recall"] == row["coverage"] == 1
    far = measure(classifier, x + 5, x, classify(classifier, x)[0])
    assert far["precision"] == far["recall"] == 0 and far["distance"] > 5


def test_a_classifier_learns_small_digits():
    digits = load_images("digits")
    classifier = train_classifier(digits.train, digits.train_labels, num_images=20_000)
    assert (classify(classifier, digits.test)[0] == digits.test_labels).mean() > 0.9


def test_scales_are_those_of_the_data():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((20_000, 1)) * 3 * np.eye(16)[0] + rng.standard_normal((20_000, 16))).reshape(-1, 4, 4, 1)
    scales = measure_scales(x)
    pixel_std = np.sqrt((10 + 15) / 16)
    assert scales.pixel_std == pytest.approx(pixel_std, rel=0.01)
    assert scales.noise_range == pytest.approx((0.2 * pixel_std, 2 * np.sqrt(10)), rel=0.02)
    assert scales.latent_dim == 14  # 10 and 13 ones of a variance of 25 are 0.92 of it


def test_the_recipe_trains_a_generator_that_follows_a_frozen_density():
    x, recipe = load_images("digits").train, Recipe(60, 64, 60)
    dde = train_density(x, recipe)
    weights = dde.net.get_weights()
    egm = train_generator(dde, x, recipe)
    for weight, before in zip(dde.net.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, before)
    start = train_generator(dde, x, recipe._replace(steps=1))
    real, fake = (egm.dde_real.log_density(each.sample(500, seed=0), 0.5).numpy().mean() for each in (egm, start))
    assert real > fake + 5  # nats


def test_a_generator_of_stacks_starts_with_independent_colours():
    x = np.repeat(load_images("digits").train, 3, axis=-1)
    z = np.random.default_rng(0).standard_normal((2000, 30)).astype(np.float32)
    colours = build_stack_generator(x, 30)(z).numpy().reshape(2000, 64, 3)
    red, green = (colours[:, 28, channel] for channel in (0, 1))  # a pixel in the middle
    assert red.std() > 0.3 and abs(np.corrcoef(red, green)[0, 1]) < 0.1


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_ready_made_model_of_images_loads_and_corrects(name):
    path = EXAMPLES / "example_models" / f"{name}.keras"
    assert path.stat().st_size < 8_000_000
    egm = EGM.load(path)
    for corrected in (False, True):
        images = egm.sample(200, seed=0, corrected=corrected)
        assert images.shape == (200, 28, 28, 1)
        assert np.quantile(abs(images), 0.999) < 1.3  # the limits, -1 and 1, are soft
        assert 0.4 < np.sqrt(images.var(axis=0).mean()) < 0.7  # 0.52 and 0.59 for real ones


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_kept_sheet_is_of_the_kept_model(name):
    """The shares below it are not compared: they need the classifier. The images are those of the pools."""
    egm = EGM.load(EXAMPLES / "example_models" / f"{name}.keras")
    pools = {"generated": egm.sample(10_000, seed=1), "corrected": egm.sample(10_000, seed=1, corrected=True)}
    kept = iio.imread(EXAMPLES / "example_images" / f"{name}.png")[..., :3].astype(float)
    figure = draw_sheet({**pools, "test images": pools["generated"]}, np.full((3, 10), 0.1))
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(100)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(float)
    height, width = drawn.shape[:2]
    assert kept.shape == drawn.shape
    third = width // 3
    generated = np.s_[30 : int(0.85 * height), :third]
    # On another processor, rounding may tip one image in a hundred over the edge, and all that follow move up.
    first_corrected = np.s_[30 : 30 + third // 10, third : 2 * third - 8]
    for shown in (generated, first_corrected):
        assert abs(kept[shown] - drawn[shown]).mean() < 2  # of 255
