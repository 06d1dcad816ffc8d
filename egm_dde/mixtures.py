"""Mixtures of Gaussians with noise: a layer, exact at every level, networks on it, points of it, and other mixtures."""

import math
import warnings

import keras
import numpy as np
import tensorflow as tf
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from egm_dde import draws, networks

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # of components
REGULARIZERS = (1e-6, 1e-2)  # of covariances
STRENGTHS = (0.0, 1.0, 4.0, math.inf)  # with which covariances are drawn to their mean
SUBSPACE_DIMS = (1, 2, 4, 8, 16)
WIDTHS = 4.0 ** np.arange(1, 6)  # of Gaussians for rows far from all others
MOST_ROWS_TO_FIT = 20_000


@networks.register
class NoisyMixture(networks.ExactLayer):
    """Log density (batch, 1) of a mixture of Gaussians with noise, sum_k w_k N(y; m_k, C_k + noise_std^2 I).

    Each covariance is kept as its principal axes (d, d), in columns, and the variances (d,) along them, to which noise
    adds noise_std^2: every level costs the same.
    """

    options = ("num_components",)

    def __init__(self, num_components, **kwargs):
        super().__init__(**kwargs)
        self.num_components = num_components

    def build(self, x_shape, log_noise_std_shape=None):
        k, d = self.num_components, x_shape[-1]
        self.add_constants(log_weights=(k,), means=(k, d), axes=(k, d, d), variances=(k, d))

    def call(self, x, log_noise_std):
        k, d = self.means.shape
        all_axes = keras.ops.reshape(keras.ops.transpose(self.axes, (1, 0, 2)), (d, k * d))
        along_axes = keras.ops.reshape(keras.ops.matmul(x, all_axes), (-1, k, d))
        means = keras.ops.matmul(self.means[:, None], self.axes)[:, 0]  # along the axes of each component, too
        # In this order: keras.ops.add takes a second argument (batch, 1, 1) for a bias of the columns, if batch = d.
        variances = keras.ops.exp(2.0 * log_noise_std)[:, :, None] + self.variances  # (batch, k, d)
        log_densities = keras.ops.sum(networks.log_normal(along_axes, means, variances), axis=-1)
        return keras.ops.logsumexp(self.log_weights + log_densities, axis=-1, keepdims=True)

    def sample(self, noise_std, key):
        """Draw a point (batch, d) with noise of each of the levels (batch, 1)."""
        component_key, noise_key = draws.split(key)
        shares = tf.cumsum(tf.exp(self.log_weights))
        places = shares[-1] * draws.uniform([tf.shape(noise_std)[0]], component_key, shares.dtype)
        k = tf.minimum(tf.searchsorted(shares, places, side="right"), self.num_components - 1)
        noise = draws.normal([tf.shape(k)[0], self.means.shape[1]], noise_key, noise_std.dtype)
        along_axes = tf.sqrt(tf.gather(self.variances, k) + noise_std**2) * noise
        return tf.gather(self.means, k) + tf.linalg.matvec(tf.gather(self.axes, k), along_axes)


def build_reference_net(mixture, widths=(128, 128), seed=0):
    """Build the network of a ``ReferenceDDE`` on a ``NoisyMixture`` of points that are about as wide as 1.

    The correction is 0 at first. It has random Fourier features in up to three dimensions.
    """
    (k, d), exact = mixture.means.shape, networks.exact_type()
    inputs = [keras.Input((size,), name=name, dtype=exact) for name, size in (("x", d), ("log_noise_std", 1))]
    features = networks.RandomFourierFeatures(64, 2.0, seed, data_std=1.0) if d <= 3 else networks.NoiseScaling(1.0)
    hidden = keras.layers.Concatenate()([features(*inputs), inputs[1]])
    hidden = networks.stack_dense_layers(hidden, widths, "silu", networks.initializers("GlorotUniform", seed))
    correction = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="zeros")(hidden), name="correction")
    reference = NoisyMixture(k, name="reference")
    net = keras.Model(inputs, keras.layers.Add()([reference(*inputs), correction(inputs)]), name="reference_net")
    reference.set_weights(mixture.get_weights())
    return net


def fit_candidates(folds, counts, regularizers, subspace_dims, seed):  # noqa: D417
    """Fit mixtures of many kinds to points whose covariance is I, each with more components until that no longer helps.

    The first candidate is wide, the same mixture of N(0, width^2 I) for all tables: a row far from all others, such as
    an error of measurement, gets a density of it that is small, and not absurdly small. In the others, components have
    covariances of their own; or these, drawn to their mean; or they differ in few directions alone, those in which the
    components of the best mixture so far differ most, and are N(0, I) in all others.

    Args:
        folds: pairs of points (n, d) to fit to, and points that are held out.
        counts, regularizers: numbers of components, and what is added to the diagonal of their covariances.
        subspace_dims: numbers of directions in which components differ, for mixtures of that kind.

    Returns:
        Candidates, each a list with a scikit-learn mixture for each fold; their log densities (candidates, m) at the
        points that are held out.
    """
    candidates, log_densities = [], []
    n, d = folds[0][0].shape
    wide = make_fit(
        np.full(len(WIDTHS), 1 / len(WIDTHS)), np.zeros((len(WIDTHS), d)), WIDTHS[:, None, None] ** 2 * np.eye(d)
    )

    def judge(candidate):
        candidates.append(candidate)
        pairs = zip(candidate, folds, strict=True)
        log_densities.append(np.concatenate([fit.score_samples(held_out) for fit, (_, held_out) in pairs]))
        return log_densities[-1].mean()

    def try_counts(fit_folds, strengths):
        means = []
        for count in [k for k in counts if k == counts[0] or 3 * k <= n]:
            fits = fit_folds(count)
            means.append(
                max(judge([shrink(fit, each, n) for fit in fits]) for each in strengths[: 1 if count == 1 else None])
            )
            if max(means[-2:]) < max(means) - 0.1:  # two falls in turn
                break

    judge([wide] * len(folds))
    for reg_covar in regularizers:
        try_counts(lambda count: [fit_mixture(x, count, reg_covar, seed) for x, _ in folds], STRENGTHS)  # noqa: B023
    best = candidates[np.argmax(np.mean(log_densities, axis=1))]
    pairs = [(x, find_differences(fit)) for (x, _), fit in zip(folds, best, strict=True)]
    for dim in [each for each in subspace_dims if 2 * each <= d]:
        try_counts(lambda count: [fit_in_subspace(x, axes[:, :dim], count, seed) for x, axes in pairs], [0.0])  # noqa: B023
    return candidates, np.array(log_densities)


def fit_mixture(x, n_components, reg_covar, seed):
    """Fit scikit-learn's mixture to points (n, d), 20,000 of them at most."""
    with warnings.catch_warnings(), threadpool_limits(1):  # the matrices are small: threads would wait for each other
        warnings.simplefilter("ignore", ConvergenceWarning)  # held-out points decide all the same
        return GaussianMixture(n_components, reg_covar=reg_covar, random_state=seed).fit(x[:MOST_ROWS_TO_FIT])


def shrink(fit, strength, n):
    """Draw the covariances of a mixture of n points to their mean, as if strength * d of its points were in each."""
    if not strength:
        return fit
    mean = np.einsum("k,kij->ij", fit.weights_, fit.covariances_)
    kept = (1 - 1 / (1 + n * fit.weights_ / (strength * len(mean))))[:, None, None]
    return make_fit(fit.weights_, fit.means_, kept * fit.covariances_ + (1 - kept) * mean)


def find_differences(fit):
    """Directions (d, d), in columns, in which components differ, in means and covariances, those of the most first.

    They are the eigenvectors of sum_k w_k ((m_k - m) (m_k - m)^T + (C_k - C)^2), with the means m and C of m_k and C_k.
    """
    means = fit.means_ - fit.weights_ @ fit.means_
    covariances = fit.covariances_ - np.einsum("k,kij->ij", fit.weights_, fit.covariances_)
    squares = means[:, :, None] * means[:, None] + covariances @ covariances
    return np.linalg.eigh(np.einsum("k,kij->ij", fit.weights_, squares))[1][:, ::-1]


def fit_in_subspace(x, axes, n_components, seed):
    """Fit a mixture to points (n, d) along orthonormal axes (d, m), in columns; across them it is N(0, I)."""
    fit = fit_mixture(x @ axes, n_components, REGULARIZERS[0], seed)
    across = np.eye(len(axes)) - axes @ axes.T
    return make_fit(fit.weights_, fit.means_ @ axes.T, axes @ fit.covariances_ @ axes.T + across)


def make_fit(weights, means, covariances):
    """scikit-learn's mixture of weights (k,), means (k, d) and covariances (k, d, d)."""
    fit = GaussianMixture(len(means))
    fit.weights_, fit.means_, fit.covariances_ = weights, means, covariances
    fit.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(covariances))
    return fit


def make_mixture(weights, means, covariances):
    """A ``NoisyMixture`` in float64, of weights (k,), means (k, d) and covariances (k, d, d)."""
    mixture = NoisyMixture(len(means), dtype="float64")
    mixture.build((None, means.shape[1]))
    variances, axes = np.linalg.eigh(covariances)
    mixture.set_weights([np.log(weights), means, axes, np.maximum(variances, 0.0)])
    return mixture


def pool(fits_and_shares, x=None, kernel_share=0.0, bandwidth=1.0):
    """Pool scikit-learn's mixtures by their shares, and kernels on points x (n, d), in one ``NoisyMixture``."""
    parts = [(share * fit.weights_, fit.means_, fit.covariances_) for fit, share in fits_and_shares]
    if kernel_share:
        covariances = np.tile(bandwidth**2 * np.eye(x.shape[1]), (len(x), 1, 1))
        parts.append((np.full(len(x), kernel_share / len(x)), x, covariances))
    return make_mixture(*map(np.concatenate, zip(*parts, strict=True)))


def draw(mixture, n_samples, noise_std, seed):
    """Draw points (n_samples, d) of a ``NoisyMixture`` in float64, with noise."""
    levels = tf.fill([2048, 1], tf.constant(noise_std, tf.float64))
    keys = (draws.draw_key(seed, "partition", i) for i in range(n_samples // len(levels) + 1))
    return np.concatenate([mixture.sample(levels, key) for key in keys])[:n_samples]


def log_levels(x, noise_std):
    """Logarithms (n, 1) of one noise level for points x (n, d); minus infinity without noise."""
    return tf.math.log(tf.fill([len(x), 1], tf.constant(noise_std, x.dtype)))


def kernel_log_densities(x, y, bandwidths):
    """Log densities (bandwidths, m) at points y (m, d) of kernel density estimates on points x (n, d).

    Each is a mixture of n equal Gaussians, (1/n) sum_i N(y; x_i, bandwidth^2 I).
    """
    exponents, dim = -cdist(y, x, "sqeuclidean") / 2, x.shape[1]
    log_norms = [dim * math.log(width * math.sqrt(2 * math.pi)) + math.log(len(x)) for width in bandwidths]
    log_sums = [logsumexp(exponents / width**2, axis=1) for width in bandwidths]
    return np.stack(log_sums) - np.array(log_norms)[:, None]


def find_shares(log_densities):
    """The shares (k,) with which to pool densities, by their logarithms (k, n) at points that they were not fitted to.

    They make the pool most likely, with one more point that is dealt out evenly: so none is 0. Expectation maximisation
    finds them. (Such pools are "stacked", Smyth and Wolpert 1999.)
    """
    shares = np.full((len(log_densities), 1), 1 / len(log_densities))
    for _ in range(300):
        expected = softmax(log_densities + np.log(shares), axis=0).sum(axis=1, keepdims=True)
        shares = (expected + 1 / len(shares)) / (log_densities.shape[1] + 1)
    return shares[:, 0]


def by_chunks(function, x, size):
    """Values of ``function`` at points (n, d), in chunks of one size: none depends on how many points there are."""
    padded = np.pad(x, [(0, -len(x) % size), (0, 0)], mode="edge")
    parts = [function(tf.constant(padded[i : i + size])) for i in range(0, len(x), size)]
    return np.concatenate(parts)[: len(x)].astype(np.float64)
