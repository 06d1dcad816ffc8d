"""What a DDE gives without a generator: points, by Langevin dynamics, and the constant that normalises its density.

All functions take a trained ``energy_models.DDE`` and leave it as it is. They raise ValueError for other arguments than
described, and FloatingPointError where points or log densities are not finite: the steps are too large.
"""

import functools
import itertools
import math
import warnings
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.special import logsumexp

from egm_dde import checks, draws
from egm_dde.density import per_event

POINTS_PER_CHUNK = 2**14  # for the network: it bounds the memory, and keeps the hidden units in the cache
STEPS_AT_THE_TOP = 10  # of annealed_langevin, whose points start far from the noisy density of the highest level
# Annealed importance sampling: chains of the pilot run, and the share of accepted steps that it aims at, the best one
# in many dimensions (Roberts and Rosenthal 1998).
NUM_PILOTS = 256
BEST_ACCEPTANCE = 0.574

# Below these, as a number and as a share of all points, an effective sample size is no base for an estimate.
SMALLEST_SAMPLE_SIZE = 100
SMALLEST_SAMPLE_SHARE = 0.1


class LogPartition(NamedTuple):
    """The logarithm of an integral, estimated from weighted points, and how far to trust it."""

    value: float  # in nats
    standard_error: float  # in nats
    effective_sample_size: float  # (sum of weights)^2 / sum of weights^2, in points
    n_samples: int
    is_reliable: bool  # whether the effective sample size is at least 100 and 10 % of n_samples


def langevin(dde, x, num_steps=200, step_size=None, noise_std=None, adjusted=False, seed=None):
    """Move points by Langevin dynamics: x <- x + step_size * score(x) + sqrt(2 step_size) * N(0, I).

    After enough steps the points follow the noisy density of the DDE at one level (Roberts and Tweedie 1996). Far modes
    exchange no points in feasible time. Steps below 2 noise_std^2 are stable, but not free of error: where the density
    is Gaussian of variance a^2, the points have the variance a^2 / (1 - step_size / (2 a^2)).

    Args:
        dde: ``DDE``.
        x: start points (n, *event), in data units; data with noise of this level are the best start.
        num_steps: number of steps, an integer of at least 1.
        step_size: a positive number, in squared data units; None is 0.1 noise_std^2.
        noise_std: for a DDE of a range of levels, the level, in data units; None is the lowest.
        adjusted: whether a step is accepted or rejected by the rule of Metropolis and Hastings (MALA), so that the
            density is met exactly at any step size.
        seed: integer for repeatable points; None draws fresh noise.

    Returns:
        NumPy array (n, *event), in data units.
    """
    check_dde(dde)
    num_steps = checks.check_integer("num_steps", num_steps)
    level = choose_level(dde, noise_std, default=dde.noise_range[0])
    step_size = 0.1 * level**2 if step_size is None else checks.check_positive("step_size", step_size)
    seed = checks.check_seed(seed)
    x = tf.constant(checks.check_points("x", x, dde.event_shape, dde.variable_dtype, level))
    evaluate = functools.partial(compile_dde(dde, x), level=level)
    state = x, *evaluate(x)
    for step in range(num_steps):
        state, _ = move(evaluate, state, step_size, draws.draw_key(seed, "langevin", step), adjusted)
    return check_finite(state[0].numpy(), f"step_size={step_size:g}")


def annealed_langevin(dde, n_samples, num_levels=60, step_ratio=0.3, seed=None):
    """Draw points of the data by Langevin dynamics at ever lower noise levels (Song and Ermon 2019, arXiv:1907.05600).

    Where the noise is as wide as the data, points from a broad Gaussian soon follow the noisy density. From there, a
    geometric ladder of levels leads down. At each level s, the points take

    1. one step of ``langevin`` of size step_ratio * s^2, ten steps at the highest level;
    2. one step of the probability flow, which takes the density of this level to that of the next one, t (Song et al.
       2021, arXiv:2011.13456, Eq. 13): x <- x + (s^2 - t^2) / 2 * score(x, s).

    In all, the network is evaluated 2 num_levels + 9 times. At the end, t = 0 takes the noise of the lowest level off
    (half-denoising, arXiv:2410.05837); ``DDE.denoise`` would go twice as far, which shrinks a distribution.

    Args:
        dde: ``DDE`` of a range of levels, the highest one about as wide as the data or wider; data that are centred.
        n_samples: number of points, an integer of at least 1.
        num_levels: number of levels, an integer of at least 2.
        step_ratio: step size in units of the squared level, a positive number; 0.1 to 0.6 are good, 2 is unstable.
        seed: integer for repeatable points; None draws fresh ones.

    Returns:
        NumPy array (n_samples, *event), in data units.
    """
    check_dde(dde)
    low, high = dde.noise_range
    if not low < high:
        raise ValueError(f"dde must have a range of levels, noise_std=(low, high); got noise_std={dde.noise_std!r}")
    if dde.event_shape is None or None in dde.event_shape:
        raise ValueError(f"the network of dde must know the shape of its points, got event_shape={dde.event_shape!r}")
    n_samples = checks.check_integer("n_samples", n_samples)
    num_levels = checks.check_integer("num_levels", num_levels, 2)
    step_ratio = checks.check_positive("step_ratio", step_ratio)
    seed = checks.check_seed(seed)

    keys = (draws.draw_key(seed, "annealed_langevin", step) for step in itertools.count())
    # As wide as the noisy density is where the data are as wide as the noise.
    x = math.sqrt(2) * high * draws.normal((n_samples, *dde.event_shape), next(keys), dde.variable_dtype)
    levels = [*np.geomspace(high, low, num_levels).tolist(), 0.0]
    evaluate_at = compile_dde(dde, x)
    for level, next_level in itertools.pairwise(levels):
        evaluate = functools.partial(evaluate_at, level=level)
        state = x, *evaluate(x)
        for _ in range(STEPS_AT_THE_TOP if level == high else 1):
            state, _ = move(evaluate, state, step_ratio * level**2, next(keys))
        x, _, score = state
        x += (level**2 - next_level**2) / 2 * score
    return check_finite(x.numpy(), f"step_ratio={step_ratio:g}")


def move(evaluate, state, step_size, key, adjusted=False, power=1.0):
    """Take one Langevin step in the density N(0, I)^(1 - power) * exp(log density)^power.

    ``evaluate`` maps points (n, *event) to their log density (n, 1) and score (n, *event); ``state`` is points and what
    it returns for them. Returns the state after the step, and the share of the points that took it.
    """

    def temper(x, log_density, score):
        return power * log_density - (1 - power) * squared_norm(x) / 2, power * score - (1 - power) * x

    noise_key, acceptance_key = draws.split(key)
    x = state[0]
    log_density, score = temper(*state)
    noise = draws.normal(tf.shape(x), noise_key, x.dtype)
    new_x = x + step_size * score + math.sqrt(2 * step_size) * noise
    new_state = new_x, *evaluate(new_x)
    if not adjusted:
        return new_state, 1.0
    new_log_density, new_score = temper(*new_state)
    noise_back = (x - new_x - step_size * new_score) / math.sqrt(2 * step_size)  # of the step from new_x to x
    log_ratio = new_log_density - log_density + (squared_norm(noise) - squared_norm(noise_back)) / 2  # (n, 1)
    is_accepted = tf.math.log(draws.uniform(tf.shape(log_ratio), acceptance_key, x.dtype)) < log_ratio  # not for NaN
    state = tuple(tf.where(per_event(is_accepted, old), new, old) for new, old in zip(new_state, state, strict=True))
    return state, float(tf.reduce_mean(tf.cast(is_accepted, x.dtype)))


def log_partition(dde, data, n_samples=10_000, noise_std=None, num_steps=100, seed=None):
    """Estimate log Z, Z the integral of exp(dde.log_density), by annealed importance sampling (Neal 2001).

    ``dde.log_density(x, noise_std) - value`` is then a normalised log density, in nats. Points start from the Gaussian
    density q that has mean and covariance of the data with noise, and go through the densities proportional to
    q^(1 - b) exp(log density)^b, with b = 1/num_steps, 2/num_steps, ..., 1. At each b they take one adjusted Langevin
    step, in coordinates where q is standard normal, of a size that a pilot run has found. Their weights w, the product
    of (exp(log density) / q)^(1/num_steps) on the way, have the mean Z whatever the density is, so that

        value = log(mean of w),  effective sample size = (sum of w)^2 / sum of w^2,
        standard error = sqrt(1 / effective sample size - 1 / n).

    With a range of levels, dual score matching gives all of them one constant, so it is measured at the highest, where
    it is easy. In many dimensions the constants may differ by a tenth of a nat and more, which no standard error tells:
    where that matters, give the level that is used as ``noise_std``. A part of the density where no point arrives, such
    as a mode that ``data`` do not have, is missed unseen.

    Args:
        dde: ``DDE``.
        data: clean data points (n, *event), in data units; a few thousand are enough.
        n_samples: number of weighted points, an integer of at least 1.
        noise_std: for a DDE of a range of levels, the level, in data units; None is the highest.
        num_steps: number of steps, an integer of at least 1; the more, the more equal the weights.
        seed: integer for a repeatable estimate; None draws fresh points.

    Returns:
        ``LogPartition``. A UserWarning says if the effective sample size is too small: the value is then too low.
    """
    check_dde(dde)
    n_samples = checks.check_integer("n_samples", n_samples)
    num_steps = checks.check_integer("num_steps", num_steps)
    level = choose_level(dde, noise_std, default=dde.noise_range[1])
    seed = checks.check_seed(seed)
    data = checks.check_points("data", data, dde.event_shape, dde.variable_dtype, level)
    log_weights = weigh(dde, data, level, n_samples, num_steps, seed)
    log_sum = logsumexp(log_weights)
    if not math.isfinite(log_sum):
        raise FloatingPointError(f"the log density of dde must be finite, got {log_sum} as the logarithm of its sum")
    sample_size = math.exp(2 * log_sum - logsumexp(2 * log_weights))
    is_reliable = sample_size >= max(SMALLEST_SAMPLE_SIZE, SMALLEST_SAMPLE_SHARE * n_samples)
    if not is_reliable:
        warnings.warn(
            f"{n_samples} points have an effective sample size of {sample_size:.1f}, so log Z is most likely too low: "
            "try more num_steps, a larger noise_std, or data that the DDE has learned",
            stacklevel=2,
        )
    value = float(log_sum - math.log(n_samples))
    standard_error = math.sqrt(max(1 / sample_size - 1 / n_samples, 0.0))
    return LogPartition(value, standard_error, sample_size, n_samples, is_reliable)


def weigh(dde, data, level, n_samples, num_steps, seed):
    """Logarithms (n_samples,) of the weights of annealed importance sampling."""
    points = data.reshape(len(data), -1).astype(np.float64)
    mean, dim = points.mean(axis=0), points.shape[1]
    covariance = (points - mean).T @ (points - mean) / len(points)
    factor = np.linalg.cholesky(covariance + level**2 * np.eye(dim))
    log_normalizer = dim / 2 * math.log(2 * math.pi) + np.log(np.diag(factor)).sum()  # of the start
    matrix, centre = tf.constant(factor, data.dtype), tf.constant(mean, data.dtype)
    evaluate_dde = compile_dde(dde, data)

    def evaluate(z):  # the points of the DDE are mean + factor z
        x = centre + tf.matmul(z, matrix, transpose_b=True)
        log_density, score = evaluate_dde(tf.reshape(x, (-1, *data.shape[1:])), level)
        return log_density, tf.matmul(tf.reshape(score, tf.shape(z)), matrix)

    def anneal(n_chains, step_sizes, keys, adapts):
        """Take chains from N(0, I) to the density of the DDE; return the log weights, and the sizes of the steps."""
        z = draws.normal((n_chains, dim), next(keys), data.dtype)
        state = z, *evaluate(z)
        log_weights, scale, sizes = np.zeros(n_chains), 1.0, []
        for step, size in enumerate(step_sizes):
            z, log_density, _ = state
            log_weights += (log_density + squared_norm(z) / 2).numpy()[:, 0].astype(np.float64) / num_steps
            sizes.append(scale * size)
            power = (step + 1) / num_steps
            state, acceptance = move(evaluate, state, sizes[-1], next(keys), adjusted=True, power=power)
            if adapts:
                scale *= math.exp(0.5 * (acceptance - BEST_ACCEPTANCE))
        return log_weights, sizes

    keys = (draws.draw_key(seed, "partition", step) for step in itertools.count())
    # Step sizes that come from other chains leave the mean of the weights exact. The pilot run starts from the size
    # that is best for the standard normal density.
    step_sizes = [1.65**2 / 2 * dim ** (-1 / 3)] * num_steps
    _, step_sizes = anneal(NUM_PILOTS, step_sizes, keys, adapts=True)
    log_weights, _ = anneal(n_samples, step_sizes, keys, adapts=False)
    return log_weights + log_normalizer


def compile_dde(dde, x):
    """Return a function of points (n, *event) and a level to log density (n, 1) and score (n, *event), run as a graph.

    The points ``x`` are such points: one of them builds a network that has no Input.
    """
    dde(x[:1])
    specs = [tf.TensorSpec((None, *dde.event_shape), dde.variable_dtype), tf.TensorSpec((), dde.variable_dtype)]
    graph = tf.function(lambda x, level: dde(x, noise_std=level), specs, autograph=False)

    def evaluate(x, level):
        starts, level = range(0, len(x), POINTS_PER_CHUNK), tf.constant(level, dde.variable_dtype)
        log_density, score = zip(*(graph(x[start : start + POINTS_PER_CHUNK], level) for start in starts), strict=True)
        return tf.concat(log_density, axis=0), tf.concat(score, axis=0)

    return evaluate


def squared_norm(x):
    """Sum (n, 1) of the squares of each point (n, *event)."""
    return tf.reduce_sum(tf.square(x), axis=range(1, x.shape.rank))[:, None]


def check_dde(dde):
    """Raise ValueError for what has no log density at noise levels."""
    if not callable(getattr(dde, "log_density", None)) or not hasattr(dde, "noise_range"):
        raise ValueError(f"dde must be a DDE, with log_density and noise_range; got {dde!r}")


def choose_level(dde, noise_std, default):
    """Return one noise level, within the range of a DDE, as a float; None is the default."""
    level = checks.check_positive("noise_std", default if noise_std is None else noise_std)
    checks.check_levels(level, dde.noise_range, num_points=1)
    return level


def check_finite(x, step):
    """Return points (n, *event), or raise FloatingPointError if some are not finite."""
    num_bad = np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    if num_bad:
        raise FloatingPointError(f"{num_bad} of {len(x)} points are not finite: {step} is too large for this density")
    return x
