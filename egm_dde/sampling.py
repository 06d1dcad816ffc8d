"""What a DDE gives without a generator: points, by Langevin dynamics, and the constant that normalises its density.

* ``langevin`` moves points until they follow the noisy density at one level.
* ``annealed_langevin`` draws points of the data, with a DDE of a range of levels.
* ``log_partition`` estimates the logarithm of the integral of exp(log density), with its standard error: subtract it,
  and the log density is normalised.

All of them take a trained ``energy_models.DDE`` and leave it as it is; nothing is learned here.
"""

import math
import warnings
import weakref
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.linalg import solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import gammaln, logsumexp

from energy_models import (
    _ACCEPTANCE,
    _ANNEALED_LANGEVIN,
    _LANGEVIN,
    _NOISE,
    _PARTITION,
    DDE,
    _check_seed,
    _draw_normal,
    _draw_uniform,
    _is_finite_number,
    _key,
)
from egm_dde.training import check_points, check_positive_integer

# Bounds the memory, and keeps the hidden units in the cache: this many points at a time.
_POINTS_PER_CHUNK = 2**14

# The points of annealed_langevin start far from the noisy density of the highest level, those of a lower one do not.
_STEPS_AT_THE_TOP = 10

# The proposal of importance sampling: data points that it is centred on, the weight of its broad part (Hesterberg
# 1995), and what its degrees of freedom exceed the number of coordinates by: a t distribution is then close to a
# Gaussian in any number of dimensions, and has heavier tails than every density that falls off like one.
_NUM_CENTRES = 1024
_BROAD_SHARE = 0.1
_FREEDOM = 5

# Annealed importance sampling: chains of the pilot run, and the share of accepted steps that it aims at, the best one
# in many dimensions (Roberts and Rosenthal 1998).
_NUM_PILOTS = 256
_BEST_ACCEPTANCE = 0.574

# Below these, as a number and as a share of all points, an effective sample size is no base for an estimate.
_SMALLEST_SAMPLE_SIZE = 100
_SMALLEST_SAMPLE_SHARE = 0.1


class LogPartition(NamedTuple):
    """The logarithm of an integral, estimated from weighted points, and how far to trust it.

    Attributes:
        value: the estimate, in nats.
        standard_error: its standard error, in nats.
        effective_sample_size: (sum of weights)^2 / sum of weights^2, in points.
        n_samples: the number of points.
        is_reliable: whether the effective sample size is at least 100 and 10 % of ``n_samples``.
    """

    value: float
    standard_error: float
    effective_sample_size: float
    n_samples: int
    is_reliable: bool


# ---------------------------------------------------------------------------------------------- points


def langevin(dde, x, num_steps=200, step_size=None, noise_std=None, adjusted=False, seed=None):
    """Move points by Langevin dynamics: x <- x + step_size * score(x) + sqrt(2 step_size) * N(0, I).

    After enough steps the points follow the noisy density of the DDE at one level (Roberts and Tweedie 1996). They
    forget their start like exp(-num_steps * step_size / a^2), where a is the standard deviation of the widest part of
    the density that is in one piece. Far modes exchange no points in feasible time and keep the shares of the start.

    The log density of data with noise is nowhere more curved downwards than that of the noise alone, by
    1 / noise_std^2. Steps below 2 noise_std^2 are therefore stable for a DDE that has learned its data, but they are
    not free of error: along an axis where the density is Gaussian of variance a^2, the points have the variance

        a^2 / (1 - step_size / (2 a^2)).

    As a^2 is at least noise_std^2, the default of 0.1 noise_std^2 is off by 5 % at most. With ``adjusted``, a step is
    accepted or rejected by the rule of Metropolis and Hastings (MALA), so that the density is met exactly at any step
    size: the largest one at which about 0.6 of the steps are accepted explores fastest.

    Args:
        dde: ``DDE``.
        x: start points (n, *event), in data units; data with noise of this level are the best start.
        num_steps: number of steps, an integer of at least 1.
        step_size: a positive number, in squared data units; None is 0.1 noise_std^2.
        noise_std: for a DDE of a range of levels, the level, in data units; None is the lowest.
        adjusted: whether a step may be rejected.
        seed: integer for repeatable points; None draws fresh noise.

    Returns:
        NumPy array (n, *event), in data units.

    Raises:
        ValueError: for arguments that are not as above.
        FloatingPointError: if a point ends at infinity: the steps are too large.
    """
    _check_dde(dde)
    check_positive_integer("num_steps", num_steps)
    level = _check_level(dde, noise_std, default=dde.noise_range[0])
    step_size = 0.1 * level**2 if step_size is None else _check_positive("step_size", step_size)
    if not isinstance(adjusted, bool):
        raise ValueError(f"adjusted must be True or False, got {adjusted!r}")
    seed = _check_seed(seed)
    x = _check_points(dde, "x", x, level)
    x = _compute(_walk, dde, x, level, step_size, int(num_steps), seed, adjusted=adjusted)
    return _check_finite_points(x, f"step_size={step_size:g}")


def annealed_langevin(dde, n_samples, num_levels=60, steps_per_level=1, step_ratio=0.3, denoise=True, seed=None):
    """Draw points of the data by Langevin dynamics at ever lower noise levels (Song and Ermon 2019, arXiv:1907.05600).

    Where the noise is as wide as the data, no two modes are apart, and points from a broad Gaussian soon follow the
    noisy density. From there, a geometric ladder of levels leads down. Each level s has ``steps_per_level`` steps of
    ``langevin`` of size step_ratio * s^2, the first one ten times as many. From there to the next level, t, the points
    follow the flow that takes one density to the other (Song et al. 2021, arXiv:2011.13456, Eq. 13), by

        x <- x + (s^2 - t^2) / 2 * score(x, s),

    which saves half of the steps that Langevin dynamics alone would need, or more. With t = 0, the same takes the noise
    of the lowest level off (half-denoising, arXiv:2410.05837). ``DDE.denoise`` goes twice as far, to the mean of the
    points that x may have come from, which shrinks a distribution by about what the noise had widened it.

    The network is evaluated 2 num_levels + 10 times with one step a level. More levels help more than more steps at
    each: on the checkerboard, 15, 30 and 60 levels of one step come within 2.6, 1.9 and 1.4 times the sliced
    Wasserstein distance between two real samples of 50,000 points.

    Args:
        dde: ``DDE`` of a range of levels, the highest one about as wide as the data or wider; data that are centred.
        n_samples: number of points, an integer of at least 1.
        num_levels: number of levels, an integer of at least 2.
        steps_per_level: number of steps at each level, an integer of at least 1.
        step_ratio: step size in units of the squared level, a positive number; 0.1 to 0.6 are good, 2 is unstable.
        denoise: whether the points come to the clean data, or follow the noisy density of the lowest level.
        seed: integer for repeatable points; None draws fresh ones.

    Returns:
        NumPy array (n_samples, *event), in data units.

    Raises:
        ValueError: for arguments that are not as above, or a network that does not know the shape of its points yet.
        FloatingPointError: if a point ends at infinity: the steps are too large.
    """
    _check_dde(dde)
    if not dde.noise_conditional:
        raise ValueError(f"dde must have a range of levels, noise_std=(low, high); got noise_std={dde.noise_std!r}")
    if dde.event_shape is None or None in dde.event_shape:
        raise ValueError(f"the network of dde must know the shape of its points, got event_shape={dde.event_shape!r}")
    for name, value in (("n_samples", n_samples), ("num_levels", num_levels), ("steps_per_level", steps_per_level)):
        check_positive_integer(name, value)
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, got {num_levels!r}")
    step_ratio = _check_positive("step_ratio", step_ratio)
    if not isinstance(denoise, bool):
        raise ValueError(f"denoise must be True or False, got {denoise!r}")
    seed = _check_seed(seed)
    low, high = dde.noise_range
    levels = np.append(np.geomspace(high, low, num_levels), 0.0 if denoise else low)
    # As wide as the noisy density is where the data are as wide as the noise.
    x = np.random.default_rng([seed, _ANNEALED_LANGEVIN]).normal(
        0.0, math.sqrt(2) * high, (n_samples, *dde.event_shape)
    )
    x = _compute(_walk_down, dde, x.astype(dde.variable_dtype), levels, step_ratio, int(steps_per_level), seed)
    return _check_finite_points(x, f"step_ratio={step_ratio:g}")


def _walk(dde, x, level, step_size, num_steps, seed, first, adjusted):
    """Take steps at one level; the numbers of streams of random numbers count from ``first``."""

    def evaluate(x):
        return dde(x, noise_std=level)

    def move(step, *state):
        return step + 1, *_move(evaluate, state, step_size, _key(seed, _LANGEVIN, first + step), adjusted)[0]

    return _repeat(move, num_steps, x, *evaluate(x))[1]


def _walk_down(dde, x, levels, step_ratio, steps_per_level, seed, first):
    """Take steps at each of the levels (num_levels + 1,) but the last one, and go down to the next."""

    def visit(index, count, x):
        level, next_level = levels[index], levels[index + 1]

        def evaluate(x):
            return dde(x, noise_std=level)

        def move(step, *state):
            key = _key(seed, _ANNEALED_LANGEVIN, first + count + step)
            return step + 1, *_move(evaluate, state, step_ratio * level**2, key)[0]

        num_steps = tf.where(index == 0, _STEPS_AT_THE_TOP * steps_per_level, steps_per_level)
        _, x, _, score = _repeat(move, num_steps, x, *evaluate(x))
        x += (level**2 - next_level**2) / 2 * score
        return index + 1, count + num_steps, x

    return _repeat(visit, tf.size(levels, tf.int64) - 1, _number(0), x)[2]


def _move(evaluate, state, step_size, key, adjusted=False):
    """Take one Langevin step.

    Args:
        evaluate: function of points (n, *event) to their log density (n, 1), score (n, *event) and whatever else
            belongs to them, (n, ...).
        state: points, and what ``evaluate`` returns for them.
        step_size: scalar tensor.
        key: uint64 tensor (2,), the seed and the stream of the draws.
        adjusted: whether the step may be rejected.

    Returns:
        The state after the step, and the share of the points that took it.
    """
    x, log_density, score, *_ = state
    noise = _draw_normal(tf.shape(x), key, _NOISE, x.dtype)
    new_x = x + step_size * score + tf.sqrt(2.0 * step_size) * noise
    new_state = (new_x, *evaluate(new_x))
    if not adjusted:
        return new_state, 1.0
    _, new_log_density, new_score, *_ = new_state
    noise_back = (x - new_x - step_size * new_score) / tf.sqrt(2.0 * step_size)  # of the step from new_x to x
    log_ratio = new_log_density - log_density + (_squared_norm(noise) - _squared_norm(noise_back)) / 2  # (n, 1)
    is_accepted = tf.math.log(_draw_uniform(tf.shape(log_ratio), key, _ACCEPTANCE, x.dtype)) < log_ratio  # not for NaN
    state = tuple(
        tf.where(tf.reshape(is_accepted, (-1,) + (1,) * (old.shape.rank - 1)), new, old)
        for new, old in zip(new_state, state, strict=True)
    )
    return state, tf.reduce_mean(tf.cast(is_accepted, x.dtype))


# ---------------------------------------------------------------------------------------------- the constant


def log_partition(dde, data, method="importance", n_samples=10_000, noise_std=None, num_steps=200, seed=None):
    """Estimate log Z, the logarithm of the integral Z of exp(dde.log_density), by weighted points.

    ``dde.log_density(x, noise_std) - value`` is then a normalised log density, in nats. The weights w of n points have
    the mean Z whatever the density is, so that

        value = log(mean of w),  effective sample size = (sum of w)^2 / sum of w^2,
        standard error = sqrt(1 / effective sample size - 1 / n).

    ``"importance"``: w = exp(log density) / q at points drawn from a proposal density q that is fitted to the data: a
    mixture of t distributions around data points, as wide as a kernel density estimate (Silverman's rule) and the noise
    together, and one part that is as wide as all data with noise. Nearly all weights are equal where the noise is as
    wide as the data, in any number of dimensions, and where few dimensions are full of data.

    ``"annealed"``: annealed importance sampling (Neal 2001). The points start from the Gaussian q that has mean and
    covariance of the data with noise, and go through the densities proportional to q^(1 - b) exp(log density)^b, with
    b = 1/num_steps, 2/num_steps, ..., 1; their weights are the product of (exp(log density) / q)^(1/num_steps) on the
    way. At each b they take one Langevin step that leaves its density exactly as it is (``adjusted`` in ``langevin``,
    in coordinates where q is standard normal), of a size that a pilot run has found. It takes about ``num_steps`` times
    as long, and is for densities far from Gaussian in more than a few dimensions, with noise too low to hide that.

    With a range of levels, dual score matching (arXiv:2506.05310) gives all of them one constant, so it is measured at
    the highest, where it is easy. On the models of the tutorial, it is that of the lowest level to 0.006 nats; in many
    dimensions the two may differ by a tenth of a nat and more, which no standard error tells. Where that matters, give
    the level that is used as ``noise_std``, with "annealed".

    The effective sample size tells how well the points that were drawn cover the density; a part of it where none was
    drawn, such as a mode that ``data`` do not have, is missed unseen.

    Args:
        dde: ``DDE``.
        data: clean data points (n, *event), in data units; a few thousand are enough.
        method: "importance" or "annealed".
        n_samples: number of weighted points, an integer of at least 1.
        noise_std: for a DDE of a range of levels, the level, in data units; None is the highest.
        num_steps: number of steps of "annealed", an integer of at least 1; the more, the more equal the weights.
        seed: integer for a repeatable estimate; None draws fresh points.

    Returns:
        ``LogPartition(value, standard_error, effective_sample_size, n_samples, is_reliable)``.

    Raises:
        ValueError: for arguments that are not as above.
        FloatingPointError: if the log density is NaN, or infinite, at a point.

    Warns:
        UserWarning: if the effective sample size is below 100 or 10 % of ``n_samples``: the value is most likely too
            low, and the standard error as well.
    """
    _check_dde(dde)
    if method not in ("importance", "annealed"):
        raise ValueError(f'method must be "importance" or "annealed", got {method!r}')
    check_positive_integer("n_samples", n_samples)
    check_positive_integer("num_steps", num_steps)
    level = _check_level(dde, noise_std, default=dde.noise_range[1])
    seed = _check_seed(seed)
    data = _check_points(dde, "data", data, level)
    if method == "importance":
        log_weights = _weigh(dde, data, level, int(n_samples), seed)
    else:
        log_weights = _weigh_annealed(dde, data, level, int(n_samples), int(num_steps), seed)
    log_sum = logsumexp(log_weights)
    if not math.isfinite(log_sum):
        raise FloatingPointError(f"the log density of dde must be finite, got {log_sum} as the logarithm of its sum")
    sample_size = math.exp(2 * log_sum - logsumexp(2 * log_weights))
    is_reliable = sample_size >= max(_SMALLEST_SAMPLE_SIZE, _SMALLEST_SAMPLE_SHARE * n_samples)
    if not is_reliable:
        warnings.warn(
            f"{n_samples} points have an effective sample size of {sample_size:.1f}, so log Z is most likely too low: "
            'try method="annealed", more num_steps, a larger noise_std, or data that the DDE has learned',
            stacklevel=2,
        )
    return LogPartition(
        value=float(log_sum - math.log(n_samples)),
        standard_error=math.sqrt(max(1 / sample_size - 1 / n_samples, 0.0)),
        effective_sample_size=sample_size,
        n_samples=int(n_samples),
        is_reliable=bool(is_reliable),
    )


def _weigh(dde, data, level, n_samples, seed):
    """Logarithms (n_samples,) of the weights of importance sampling."""
    rng = np.random.default_rng([seed, _PARTITION])
    data, shape = _flatten(data), (-1, *data.shape[1:])
    mean, covariance = _moments(data)
    dim = len(mean)
    noise = level**2 * np.eye(dim)
    centres = data[rng.permutation(len(data))[:_NUM_CENTRES]]
    # Silverman's rule, and centres moved inwards, so that mean and covariance of the mixture are those of the data.
    width = min(1.0, (4 / (len(centres) * (dim + 2))) ** (1 / (dim + 4)))
    centres = mean + math.sqrt(1 - width**2) * (centres - mean)
    fine = _StudentMixture(centres, width**2 * covariance + noise, dim + _FREEDOM)
    broad = _StudentMixture(mean[None], covariance + noise, dim + _FREEDOM)

    is_broad = rng.random(n_samples) < _BROAD_SHARE
    x = np.where(is_broad[:, None], broad.draw(n_samples, rng), fine.draw(n_samples, rng)).astype(dde.variable_dtype)
    log_density = _compute(_evaluate, dde, x.reshape(shape), level)[:, 0].astype(np.float64)
    x = x.astype(np.float64)
    log_proposal = np.logaddexp(
        math.log(1 - _BROAD_SHARE) + fine.log_density(x), math.log(_BROAD_SHARE) + broad.log_density(x)
    )
    return log_density - log_proposal


class _StudentMixture:
    """Multivariate t distributions of equal weight and scale around centres (m, d)."""

    def __init__(self, centres, scale, freedom):
        self.centres = centres
        self.factor = np.linalg.cholesky(scale)
        self.freedom = freedom

    def draw(self, n_samples, rng):
        """Draw points (n_samples, d)."""
        centres = self.centres[rng.integers(len(self.centres), size=n_samples)]
        stretch = np.sqrt(self.freedom / rng.chisquare(self.freedom, size=(n_samples, 1)))
        return centres + stretch * rng.standard_normal(centres.shape) @ self.factor.T

    def log_density(self, x):
        """Log density (n,) at points (n, d)."""
        dim, freedom = x.shape[1], self.freedom
        x, centres = (solve_triangular(self.factor, points.T, lower=True).T for points in (x, self.centres))
        log_sums = []
        for start in range(0, len(x), 2**10):  # bounds the memory
            squared_distances = cdist(x[start : start + 2**10], centres, "sqeuclidean")
            log_sums.append(logsumexp(-(freedom + dim) / 2 * np.log1p(squared_distances / freedom), axis=1))
        log_normalizer = gammaln(freedom / 2) - gammaln((freedom + dim) / 2) + dim / 2 * math.log(freedom * math.pi)
        log_normalizer += np.log(np.diag(self.factor)).sum() + math.log(len(centres))
        return np.concatenate(log_sums) - log_normalizer


def _weigh_annealed(dde, data, level, n_samples, num_steps, seed):
    """Logarithms (n_samples,) of the weights of annealed importance sampling."""
    mean, covariance = _moments(_flatten(data))
    dim = len(mean)
    factor = np.linalg.cholesky(covariance + level**2 * np.eye(dim))
    rng = np.random.default_rng([seed, _PARTITION])

    def anneal(n_chains, step_sizes, adapts):
        z = rng.standard_normal((n_chains, dim)).astype(dde.variable_dtype)
        # A pilot run has streams of its own.
        arguments = mean, factor, level, step_sizes, seed + 2**31 * adapts
        return _compute(_anneal, dde, z, *arguments, event_shape=data.shape[1:], adapts=adapts)

    # Steps whose sizes come from other chains leave the mean of the weights exact. The pilot's start from the best size
    # for the standard normal density.
    step_sizes = np.full(num_steps, 1.65**2 / 2 * dim ** (-1 / 3))
    step_sizes = anneal(_NUM_PILOTS, step_sizes, adapts=True)
    log_normalizer = dim / 2 * math.log(2 * math.pi) + np.log(np.diag(factor)).sum()  # of the start
    return anneal(n_samples, step_sizes, adapts=False) + log_normalizer


def _anneal(dde, z, mean, factor, level, step_sizes, seed, first, event_shape, adapts):
    """Take chains from N(0, I) to the density of the DDE.

    Args:
        dde: ``DDE``.
        z: start points (n, d) of N(0, I); the points of the DDE are mean + factor z.
        mean: (d,).
        factor: (d, d), lower triangular.
        level: the noise level.
        step_sizes: (num_steps,), those of the Langevin steps.
        seed: seed of the draws.
        first: number of the first stream of random numbers.
        event_shape: shape of a point of the DDE.
        adapts: whether the step sizes follow the share of accepted steps instead.

    Returns:
        Logarithms (n,) of the weights, float64; or, if it adapts, the sizes (num_steps,) that the steps had.
    """
    num_steps = tf.size(step_sizes, tf.int64)

    def measure(z):
        x = mean + tf.matmul(z, factor, transpose_b=True)
        log_density, score = dde(tf.reshape(x, (-1, *event_shape)), noise_std=level)
        return log_density, tf.matmul(tf.reshape(score, tf.shape(z)), factor)

    def temper(power, z, log_density, score):
        return power * log_density - (1 - power) * _squared_norm(z) / 2, power * score - (1 - power) * z

    def move(step, log_weights, log_scale, sizes, z, log_density, score):
        log_ratio = tf.cast(log_density + _squared_norm(z) / 2, tf.float64)[:, 0]
        log_weights += log_ratio / tf.cast(num_steps, tf.float64)
        power = tf.cast((step + 1) / num_steps, z.dtype)

        def evaluate(z):
            measured = measure(z)
            return *temper(power, z, *measured), *measured

        size = step_sizes[step] * tf.exp(log_scale)
        state = z, *temper(power, z, log_density, score), log_density, score
        state, acceptance = _move(evaluate, state, size, _key(seed, _PARTITION, first + step), adjusted=True)
        if adapts:
            log_scale += 0.5 * (acceptance - _BEST_ACCEPTANCE)
        z, _, _, log_density, score = state
        return step + 1, log_weights, log_scale, sizes.write(tf.cast(step, tf.int32), size), z, log_density, score

    log_weights = tf.zeros([tf.shape(z)[0]], tf.float64)
    sizes = tf.TensorArray(z.dtype, tf.size(step_sizes))
    _, log_weights, _, sizes, *_ = _repeat(move, num_steps, log_weights, tf.zeros([], z.dtype), sizes, z, *measure(z))
    return sizes.stack() if adapts else log_weights


def _evaluate(dde, x, level, first):
    return dde.log_density(x, noise_std=level)


# ---------------------------------------------------------------------------------------------- helpers

# The graphs of each DDE. They hold its weights, but not the DDE, and go when it goes.
_graphs = weakref.WeakKeyDictionary()


def _compute(function, dde, points, *arguments, **options):
    """Compute ``function(dde, points, *arguments, first, **options)`` as a graph, a chunk of points at a time.

    Args:
        function: what to compute; it is traced anew for other shapes (but any number of points) and options alone.
        dde: ``DDE``.
        points: NumPy array (n, ...).
        *arguments: numbers and arrays of them.
        **options: what is no tensor.

    Returns:
        NumPy array of the results of all chunks. ``first``, the number of a chunk's first stream of random numbers,
        makes them independent.
    """
    arguments = [_number(value) if isinstance(value, int) else tf.constant(value, points.dtype) for value in arguments]
    specs = [tf.TensorSpec((None, *points.shape[1:]), points.dtype)]
    specs += [tf.TensorSpec(value.shape, value.dtype) for value in (*arguments, _number(0))]
    graphs = _graphs.setdefault(dde, {})
    signature = function, *specs, *options.items()
    if signature not in graphs:
        reference = weakref.ref(dde)

        def compute(*inputs):
            return function(reference(), *inputs, **options)

        graphs[signature] = tf.function(compute, autograph=False).get_concrete_function(*specs)
    results = []
    for chunk, start in enumerate(range(0, len(points), _POINTS_PER_CHUNK)):
        part = tf.constant(points[start : start + _POINTS_PER_CHUNK])
        results.append(graphs[signature](part, *arguments, _number(chunk << 40)).numpy())
    return np.concatenate(results)


def _repeat(body, num_steps, *state):
    """Run ``body(step, *state)`` for steps 0, 1, ...; it returns the next step and the state after it."""
    return tf.while_loop(lambda step, *_: step < num_steps, body, (_number(0), *state), parallel_iterations=1)


def _number(value):
    return tf.constant(value, tf.int64)


def _squared_norm(x):
    """Sum (n, 1) of the squares of each point (n, *event)."""
    return tf.reduce_sum(tf.square(x), axis=range(1, x.shape.rank))[:, None]


def _flatten(points):
    return points.reshape(len(points), -1).astype(np.float64)


def _moments(points):
    """Mean (d,) and covariance (d, d) of points (n, d)."""
    mean = points.mean(axis=0)
    return mean, (points - mean).T @ (points - mean) / len(points)


def _check_dde(dde):
    if not isinstance(dde, DDE):
        raise ValueError(f"dde must be a DDE, got {dde!r}")


def _check_positive(name, value):
    if not _is_finite_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def _check_level(dde, noise_std, default):
    low, high = dde.noise_range
    level = default if noise_std is None else noise_std
    if not _is_finite_number(level) or not low * (1 - 1e-6) <= level <= high * (1 + 1e-6):
        raise ValueError(f"noise_std must be None or a number within [{low}, {high}], got {noise_std!r}")
    return float(level)


def _check_points(dde, name, x, level):
    x = check_points(name, x, dde.event_shape, dde.variable_dtype, level)
    dde(x[:1], noise_std=level)  # builds a network without an Input, which a graph cannot
    return x


def _check_finite_points(x, step):
    is_finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not is_finite.all():
        raise FloatingPointError(
            f"{(~is_finite).sum()} of {len(x)} points are not finite: {step} is too large for this density"
        )
    return x
