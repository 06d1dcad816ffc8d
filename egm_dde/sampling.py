"""Points and constants from densities: Langevin dynamics, corrected points, and the constant that normalises a density.

All functions take trained ``energy_models.DDE`` and leave them as they are. Points are arrays (n, *event), and noise
levels numbers, in data units. An integer ``seed`` makes a result repeatable; None draws fresh numbers. They raise
ValueError for other arguments than described, and FloatingPointError where points or log densities are not finite: the
steps are too large.
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
from egm_dde.draws import per_event

STEPS_AT_THE_TOP = 10  # of annealed_langevin, whose points start far from the noisy density of the highest level
# Annealed importance sampling: chains of the pilot run, and the share of accepted steps that it aims at, the best one
# in many dimensions (Roberts and Rosenthal 1998).
NUM_PILOTS, BEST_ACCEPTANCE = 256, 0.574

SMALLEST_SHARE_KEPT = 0.01  # of the points that correct draws; densities that reject more have little in common

# Below these, as a number and as a share of all points, an effective sample size is no base for an estimate.
SMALLEST_SAMPLE_SIZE, SMALLEST_SAMPLE_SHARE = 100, 0.1


class LogPartition(NamedTuple):
    """The logarithm of an integral, estimated from weighted points, and how far to trust it."""

    value: float  # in nats
    standard_error: float  # in nats
    effective_sample_size: float  # (sum of weights)^2 / sum of weights^2, in points
    n_samples: int
    is_reliable: bool  # whether the effective sample size is at least 100 and 10 % of n_samples
    noise_std: float  # the level at which the density was integrated, in data units


def langevin(dde, x, num_steps=200, step_size=None, noise_std=None, adjusted=False, seed=None):
    """Move points by Langevin dynamics: x <- x + step_size * score(x) + sqrt(2 step_size) * N(0, I).

    After enough steps the points follow the noisy density of the DDE at one level (Roberts and Tweedie 1996). Far modes
    exchange no points in feasible time. Steps below 2 noise_std^2 are stable, but not free of error: where the density
    is Gaussian of variance a^2, the points have the variance a^2 / (1 - step_size / (2 a^2)).

    The best start x are data with noise of this level. ``step_size``, in squared data units, is 0.1 noise_std^2 by
    default, and ``noise_std`` the lowest level. With ``adjusted``, each step is accepted or rejected by the rule of
    Metropolis and Hastings (MALA), so that the density is met exactly at any step size. Returns the points.
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
    return check_moved(state[0].numpy(), f"step_size={step_size:g}")


def annealed_langevin(dde, n_samples, num_levels=60, step_ratio=0.3, seed=None):
    """Draw points of the data by Langevin dynamics at ever lower noise levels (Song and Ermon 2019, arXiv:1907.05600).

    Where the noise is as wide as the data, points from a broad Gaussian soon follow the noisy density. From there, a
    geometric ladder of levels leads down. At each level s, the points take

    1. one step of ``langevin`` of size step_ratio * s^2, ten steps at the highest level;
    2. one step of the probability flow, which takes the density of this level to that of the next one, t (Song et al.
       2021, arXiv:2011.13456, Eq. 13): x <- x + (s^2 - t^2) / 2 * score(x, s).

    In all, the network is evaluated 2 num_levels + 9 times. At the end, t = 0 takes the noise of the lowest level off
    (half-denoising, arXiv:2410.05837); ``DDE.denoise`` would go twice as far, which shrinks a distribution.

    The highest level of ``dde`` has to be about as wide as the data or wider, and the data have the mean that its
    network was built for, or 0. ``num_levels`` is at least 2; ``step_ratio`` 0.1 to 0.6 is good, 2 is unstable. Returns
    n_samples points.
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
    for mean, _ in itertools.islice(checks.known_data(dde.net), 1):
        x += tf.constant(mean, x.dtype)
    levels = [*np.geomspace(high, low, num_levels).tolist(), 0.0]
    evaluate_at = compile_dde(dde, x)
    for level, next_level in itertools.pairwise(levels):
        evaluate = functools.partial(evaluate_at, level=level)
        state = x, *evaluate(x)
        for _ in range(STEPS_AT_THE_TOP if level == high else 1):
            state, _ = move(evaluate, state, step_ratio * level**2, next(keys))
        x, _, score = state
        x += (level**2 - next_level**2) / 2 * score
    return check_moved(x.numpy(), f"step_ratio={step_ratio:g}")


def correct(sample, n_samples, dde_real, dde_fake, noise_std=None, rejection_std=None, denoise_std=None, seed=None):
    """Draw points and mend them by the densities of data and points, p~ and q~. Nothing is trained for it.

    1. Noise of ``noise_std`` is added: it is of noisy points that the densities are known.
    2. A noisy point is kept with probability min(1, r), r = p~ / q~ (compare arXiv:1810.06758). The two unknown
       constants are those with which r has the mean 1 over all points drawn, as E p~ / q~ = 1 under q~.
    3. What is kept is distributed nearly like noisy data, and the probability flow (arXiv:2011.13456, Eq. 13) takes it
       to clean ones: as the variance v of the noise falls to 0, x moves by score(x) / 2 for each unit of v. One step of
       the midpoint rule does it; where half of the variance is below the lowest level, one of Euler's.

    In many dimensions the densities of nearly clean points hardly overlap, so images (height, width, channels) are
    judged at a high level, with noise of its own, and a last step denoises them. (Digits of 8 x 8 pixels, judged at the
    level at which they are mended: of 50,000 a fifth is kept, and the shares of the digits diverge by 0.14 nats, judged
    at a third of the highest level by 0.003.)

    Args:
        sample: callable ``sample(n, seed=integer)`` -> clean points (n, *event), whose noisy density is ``dde_fake``.
        n_samples: number of points to return.
        dde_real: ``DDE`` of the data.
        dde_fake: ``DDE`` of what ``sample`` draws.
        noise_std: noise level; None is 2 sqrt(2) times the lowest, or the only one.
        rejection_std: the level at which points are judged; None is ``noise_std``, with the same noise, and for images
            a third of the highest level.
        denoise_std: the level at which ``dde_real`` denoises the points in the end; None leaves that out, and is 2.5
            times the lowest level for images.
        seed: see above.

    Raises:
        ValueError: if less than a hundredth of the points is kept.
    """
    for dde in (dde_real, dde_fake):
        check_dde(dde)
    n_samples = checks.check_integer("n_samples", n_samples)
    low, high = dde_real.noise_range
    level = choose_level(dde_real, noise_std, default=min(2 * math.sqrt(2) * low, high))
    if len(dde_real.event_shape) == 3:
        rejection_std = max(high / 3, low) if rejection_std is None else rejection_std
        denoise_std = min(2.5 * low, high) if denoise_std is None else denoise_std
    judged_at = choose_level(dde_real, rejection_std, default=level)
    rng = np.random.default_rng(checks.check_seed(seed))

    def log_ratio(x, noise_std):
        return dde_real.log_density(x, noise_std) - dde_fake.log_density(x, noise_std)

    def mend(x, noise_std):
        score = dde_real.score(x, noise_std)
        if level / math.sqrt(2) >= low:
            score = dde_real.score(x + noise_std**2 / 4 * score, noise_std / math.sqrt(2))
        x += noise_std**2 / 2 * score
        return x if denoise_std is None else dde_real.denoise(x, choose_level(dde_real, denoise_std, default=low))

    pool, is_kept = [], np.ones(0, bool)
    while (num_missing := n_samples - np.count_nonzero(is_kept)) > 0:
        num_drawn = math.ceil(1.1 * num_missing / (is_kept.mean() if pool else 1.0))
        x = sample(num_drawn, seed=int(rng.integers(2**31)))
        x = checks.check_points("the values of sample", x, dde_real.event_shape, dde_real.variable_dtype, level)
        noisy = add_noise(x, judged_at, rng)
        if not pool:
            evaluate_ratio, evaluate_mended = (compile_dde(dde_real, x, function) for function in (log_ratio, mend))
        log_ratios = np.float64(evaluate_ratio(noisy, judged_at))[:, 0]
        pool.append((noisy if rejection_std is None else x, log_ratios, np.log1p(-rng.random(len(x)))))
        x, log_ratios, log_chances = map(np.concatenate, zip(*pool, strict=True))
        is_kept = log_chances < log_ratios - (logsumexp(log_ratios) - math.log(len(x)))
        if not is_kept.mean() >= SMALLEST_SHARE_KEPT:
            kept = f"{np.count_nonzero(is_kept)} of {len(x)} points with noise of {judged_at:g}"
            raise ValueError(f"the two densities have too little in common to correct points: they keep {kept}")
    x = x[is_kept][:n_samples]
    x = x if rejection_std is None else add_noise(x, level, rng)
    return check_moved(evaluate_mended(x, level).numpy(), f"noise_std={level:g}")


def add_noise(x, noise_std, rng):
    """Points (n, *event) with noise, in their own type."""
    return x + np.asarray(noise_std, x.dtype) * rng.standard_normal(x.shape).astype(x.dtype)


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
    it is easy; with ``dual_weight=0`` each level has its own, and the level that is used has to be named. In many
    dimensions the constants may differ by a tenth of a nat and more, which no standard error tells: where that matters,
    name the level, too. A part of the density where no point arrives, such as a mode that ``data`` do not have, is
    missed unseen.

    A few thousand points of clean ``data`` are enough; the more of the ``num_steps``, the more equal the weights.
    Returns a ``LogPartition``. A UserWarning says if the effective sample size is too small: the value is then too low.
    """
    check_dde(dde)
    n_samples = checks.check_integer("n_samples", n_samples)
    num_steps = checks.check_integer("num_steps", num_steps)
    if noise_std is None and dde.noise_range[0] < dde.noise_range[1] and getattr(dde, "dual_weight", 1) == 0:
        why = "with dual_weight=0 each level has a constant of its own"
        raise ValueError(f"noise_std must be the level to integrate at, within {dde.noise_range}, got None: {why}")
    level = choose_level(dde, noise_std, default=dde.noise_range[1])
    seed = checks.check_seed(seed)
    data = checks.check_points("data", data, dde.event_shape, dde.variable_dtype, level)
    estimate = weigh_up(weigh(dde, data, level, n_samples, num_steps, seed), level)
    if not estimate.is_reliable:
        size = estimate.effective_sample_size
        found = f"{n_samples} points have an effective sample size of {size:.1f}, so log Z is most likely too low"
        warnings.warn(
            f"{found}: try more num_steps, a larger noise_std, or data that the DDE has learned", stacklevel=2
        )
    return estimate


def weigh_up(log_weights, noise_std):
    """Summarise weights, given by their logarithms (n,), whose mean is the integral of a density at a noise level.

    See ``log_partition`` for the formulas. Returns a ``LogPartition``.
    """
    n_samples, log_sum = len(log_weights), logsumexp(log_weights)
    if not math.isfinite(log_sum):
        raise FloatingPointError(f"the log density of dde must be finite, got {log_sum} as the logarithm of its sum")
    sample_size = math.exp(2 * log_sum - logsumexp(2 * log_weights))
    is_reliable = sample_size >= max(SMALLEST_SAMPLE_SIZE, SMALLEST_SAMPLE_SHARE * n_samples)
    value = float(log_sum - math.log(n_samples))
    standard_error = math.sqrt(max(1 / sample_size - 1 / n_samples, 0.0))
    return LogPartition(value, standard_error, sample_size, n_samples, is_reliable, noise_std)


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


def compile_dde(dde, x, function=None):
    """Return a function of points (n, *event) and a level to what ``dde`` or one of its methods returns, as a graph.

    The points ``x`` are such points: one of them builds a network that has no Input.
    """
    dde(x[:1])
    specs = [tf.TensorSpec((None, *dde.event_shape), dde.variable_dtype), tf.TensorSpec((), dde.variable_dtype)]
    graph = tf.function(lambda x, level: (function or dde)(x, noise_std=level), specs, autograph=False)
    size = chunk_size(dde.event_shape)

    def evaluate(x, level):
        level = tf.constant(level, dde.variable_dtype)
        parts = [graph(x[start : start + size], level) for start in range(0, len(x), size)]
        return tf.nest.map_structure(lambda *part: tf.concat(part, axis=0), *parts)

    return evaluate


def chunk_size(event_shape):
    """Number of points that a network meets at a time: it bounds the memory, and keeps hidden units in the cache."""
    return max(1, min(2**14, 2**20 // math.prod(event_shape)))


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


def check_moved(x, step):
    """Return points (n, *event), or raise FloatingPointError if some are not finite."""
    num_bad = np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    if num_bad:
        raise FloatingPointError(f"{num_bad} of {len(x)} points are not finite: {step} is too large for this density")
    return x
