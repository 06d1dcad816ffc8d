import keras
import numpy as np
import pytest
from keras.optimizers import SGD
from scipy import stats
from small_models import assert_equal_arrays, differ, egm_parts, identity_generator, make_dde, make_egm, normal

from energy_models import EGM


def test_samples_are_the_generator_at_standard_normal_latents():
    egm = EGM(*egm_parts(), seed=0)
    samples = egm.sample(100_000, seed=3)  # more than are generated at a time
    assert isinstance(samples, np.ndarray)
    assert samples.shape == (100_000, 2)
    assert len(np.unique(samples, axis=0)) == len(samples)
    for column in samples.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.02


def test_samples_depend_on_their_seed():
    egm = make_egm()
    np.testing.assert_array_equal(egm.sample(5, seed=3), egm.sample(5, seed=3))
    assert not np.isin(egm.sample(5, seed=3), egm.sample(5, seed=4)).any()
    assert not np.isin(egm.sample(5), egm.sample(5)).any()
    assert egm.sample(np.int64(1), seed=3).shape == (1, 3)


def test_events_and_latents_may_have_any_shape():
    egm = EGM(make_dde("images"), make_dde("images", net_seed=20), identity_generator(4, 4, 1), seed=0)
    assert egm.sample(3, seed=0).shape == (3, 4, 4, 1)
    assert egm.draw_latents(3, "latents", 0)[0].shape == (3, 4, 4, 1)


def test_a_generator_may_name_its_output_in_a_list():
    z = keras.Input((2,))  # as in a file of Keras 3.8
    egm = EGM(*egm_parts()[:2], keras.Model(z, [keras.layers.Dense(2)(z)]), seed=0)
    assert egm.sample(3, seed=0).shape == (3, 2)


def test_latents_and_their_key_depend_on_seed_purpose_and_step():
    egm = make_egm()
    z, key = egm.draw_latents(20, "latents", 0)
    assert_equal_arrays((z, key), make_egm().draw_latents(20, "latents", 0))
    for model, purpose, step in ((make_egm(seed=1), "latents", 0), (egm, "generator", 0), (egm, "latents", 1)):
        other_z, other_key = model.draw_latents(20, purpose, step)
        assert not np.isin(z, other_z).any()
        assert not np.isin(key, other_key).any()


def test_egm_maps_latents_to_points():
    egm = make_egm()
    z = normal(10, 2)
    np.testing.assert_array_equal(egm(z), egm.generator(z))  # before training the average is the generator
    np.testing.assert_allclose(egm.predict(z, batch_size=4, verbose=0), egm(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average_decay", [0.0, 0.15])
def test_samples_come_from_a_moving_average_of_the_generator(average_decay):
    egm = make_egm(dde_steps=1, average_decay=average_decay)
    assert_equal_arrays(egm.average_generator.get_weights(), egm.generator.get_weights())
    egm.compile(SGD(0.0), SGD(1.0), run_eagerly=True)
    decays = []
    for _ in range(5):
        before = np.concatenate([weight.ravel() for weight in egm.average_generator.get_weights()])
        egm.train_on_batch(normal(8, 3))
        current = np.concatenate([weight.ravel() for weight in egm.generator.get_weights()])
        after = np.concatenate([weight.ravel() for weight in egm.average_generator.get_weights()])
        decays.append(np.dot(after - current, before - current) / np.sum((before - current) ** 2))
        np.testing.assert_allclose(after, current + decays[-1] * (before - current), atol=1e-6)
    assert np.all(np.diff(decays) > -1e-4)  # it grows to the value asked for
    np.testing.assert_allclose(decays[-1], average_decay, atol=1e-4)
    if average_decay > 0:
        assert decays[0] < 0.9 * average_decay
        assert differ(egm.generator.get_weights(), egm.average_generator.get_weights())
    z = normal(5, 2)
    np.testing.assert_array_equal(egm(z), egm.average_generator(z))
