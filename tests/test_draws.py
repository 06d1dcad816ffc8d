import itertools

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from small_models import KEY, OTHER_KEY

from egm_dde import draws


def test_a_key_is_a_function_of_seed_purpose_and_step():
    arguments = list(itertools.product((0, 1, 2**31 - 1), draws.PURPOSES, (0, 1, 2, 2**40)))
    keys = [tuple(draws.draw_key(*each).numpy()) for each in arguments]
    assert len(set(keys)) == len(keys)
    assert keys == [tuple(draws.draw_key(*each).numpy()) for each in arguments]
    in_graph = tf.function(lambda step: draws.draw_key(1, "train", step))
    for step in (tf.constant(2, tf.int32), tf.constant(2, tf.int64), tf.constant(2.0)):  # a count of points is a float
        np.testing.assert_array_equal(in_graph(step), draws.draw_key(1, "train", 2))


def test_draws_are_functions_of_their_key_with_the_distribution_of_their_name():
    keys = [KEY, OTHER_KEY, *draws.split(KEY)]
    for draw, distribution in ((draws.normal, stats.norm), (draws.uniform, stats.uniform)):
        columns = np.stack([draw((4000,), key) for key in keys])
        np.testing.assert_array_equal(columns, np.stack([draw((4000,), key) for key in keys]))
        for column in columns:
            assert stats.kstest(column, distribution.cdf).pvalue > 1e-3
        np.testing.assert_allclose(np.corrcoef(columns), np.eye(len(keys)), atol=0.06)
        assert draw((3,), KEY, tf.float64).dtype == tf.float64


@pytest.mark.parametrize("num", [1, 4, 7])
def test_stratified_numbers_are_uniform_and_one_lies_in_each_part(num):
    draw = tf.function(lambda step: draws.stratified_uniform(num, draws.draw_key(0, "train", step)))
    numbers = np.array([draw(tf.constant(step)) for step in range(300)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    for place in numbers.T:
        assert stats.kstest(place, "uniform").pvalue > 1e-3
    np.testing.assert_allclose(np.diff(np.sort(numbers, axis=1), axis=1), 1 / num, atol=1e-6)
