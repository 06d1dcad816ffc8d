"""A normalised density of a table: a mixture of Gaussians, and a network that learns what the mixture misses.

The log density of data with noise of standard deviation s is that of a reference with noise, which is exact at every s,
plus a network, in nats: log p_s(y) = log r_s(y) + c(y, s). Three things are the method; read them first:

* ``egm_dde.mixtures.NoisyMixture``: the reference, a mixture of Gaussians with noise.
* ``ReferenceDDE.denoising_loss``: Eq. 5 of arXiv:2001.02728 and its dual term, and a contrast with the reference.
* ``DensityEstimator``: a scikit-learn estimator that chooses everything by held-out likelihood.
"""

import math
import warnings

from egm_dde.runtime import require_tensorflow

require_tensorflow()  # before Keras is imported, which chooses its backend then

import keras
import numpy as np
import tensorflow as tf
from scipy.special import softmax
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from egm_dde import checks, draws, networks
from egm_dde.mixtures import (
    COUNTS,
    REGULARIZERS,
    SUBSPACE_DIMS,
    build_reference_net,
    by_chunks,
    draw,
    find_shares,
    fit_candidates,
    kernel_log_densities,
    log_levels,
    pool,
)
from egm_dde.sampling import SMALLEST_SAMPLE_SIZE, weigh_up
from egm_dde.whitening import Whitening
from energy_models import DDE

BANDWIDTHS = np.geomspace(0.05, 1.5, 24)  # of kernels, in whitened units
NUM_FOLDS, MOST_ROWS_TO_CROSS, MOST_NUMBERS_TO_CROSS = 5, 5000, 30_000  # larger tables: one part held out, no kernels
SMALLEST_SHARE, MOST_ROWS_HELD_OUT, FEWEST_ROWS_TO_TRAIN = 0.01, 2000, 40
HIGHEST_LEVEL, NUM_LEVELS, BATCH_SIZE, STEPS_BETWEEN_CHECKS = 1.0, 6, 512, 20
NUM_POINTS = 20_000  # of the reference, which weigh the constant
LARGEST_DIFFERENCE, LARGEST_ERROR = 0.2, 0.01  # in nats: of the constant from both sides, and of the mean of weights


@networks.register
class ReferenceDDE(DDE):
    """A DDE of a range of levels whose network, ``build_reference_net``, is log r_s(y) + c(y, s)."""

    def denoising_loss(self, x, key, training=False):
        """Eq. 5 with its dual term, as for every DDE, and a contrast of noisy data with noisy points of the reference.

        The contrast is mean softplus(-c(y, s)) over data + mean softplus(c(y, s)) over the reference, at the same
        levels s. It is least for c = log p_s / r_s, a ratio of normalised densities (Gutmann and Hyvarinen 2010): so
        the constant is 0 by itself, also where there are no data and Eq. 5 says nothing.
        """
        key, reference_key = draws.split(key)
        loss = super().denoising_loss(x, key, training)
        noisy_x, _, noise_std = self.add_noise(x, key)
        reference_y = self.net.get_layer("reference").sample(noise_std, reference_key)
        contrast = tf.nn.softplus(-self.log_ratio(noisy_x, noise_std, training))
        contrast += tf.nn.softplus(self.log_ratio(reference_y, noise_std, training))
        return loss + tf.reduce_mean(contrast)

    def log_ratio(self, y, noise_std, training=False):
        """The correction c(y, noise_std) (batch, 1), at one level or levels (batch, 1)."""
        levels = tf.broadcast_to(tf.cast(noise_std, y.dtype), (tf.shape(y)[0], 1))
        return self.net.get_layer("correction")([y, tf.math.log(levels)], training=training)


class KeepBest(keras.callbacks.Callback):
    """Keep the weights of the highest ``judge()``, and stop when it no longer rises; ``checks`` lists what it said."""

    def __init__(self, judge):
        super().__init__()
        self.judge, self.checks, self.best_gain, self.best_step, self.next_step = judge, [], 0.0, 0, 0

    def on_train_begin(self, logs=None):
        self.best_weights = self.model.get_weights()

    def on_epoch_end(self, epoch, logs=None):
        if (step := self.model.num_steps) >= self.next_step:
            self.checks.append({"step": step, "loss": logs["loss"], "gain": self.judge()})
            self.next_step = 1.15 * step
            if (gain := self.checks[-1]["gain"]) > self.best_gain:
                self.best_gain, self.best_step, self.best_weights = gain, step, self.model.get_weights()
            self.model.stop_training = step > 100 + 1.6 * self.best_step

    def on_train_end(self, logs=None):
        self.model.set_weights(self.best_weights)


class DensityEstimator(DensityMixin, BaseEstimator):
    """The density of a table of numbers, in nats and in the units of the table: a scikit-learn estimator.

    The columns are whitened. A fifth of the rows, 2000 at most, is held out; in small tables, each fifth in turn. The
    reference pools mixtures of Gaussians of many sizes and kinds, fitted to the rest, a wide one for rows far from all
    others, and for small tables a kernel density estimate, in shares that make the held-out rows most likely. These
    also choose the steps of training, on the best mixture; the level of the network, and whether its mixture has noise
    of that level, too; and the share of the network in the density,

        share mixture(x) exp(c(x, level)) / Z + (1 - share) reference(x).

    Z comes from both sides, as the mean of exp(c) over points of the mixture and as 1 / the mean of exp(-c) over data
    that are held out. Where these differ by more than 0.2 nats, a level is not chosen.

    Args:
        n_components: number of components of the mixtures; "auto" tries 1 to 48.
        max_steps: most steps of training; 0 trains no network, "auto" is 500 to 6000, the more the more rows.
        random_state, verbose: as in scikit-learn; verbose shows a progress bar.

    Attributes:
        level_, network_share_, kernel_share_: what was chosen, in whitened units; without a network, the level is None.
        log_normalizer_: log Z, a ``sampling.LogPartition`` with its standard error and effective sample size.
        log_normalizer_from_data_: log Z from the other side.
        history_: step, training loss and gain over the mixture, in nats a row that is held out, at each check.
        dde_: the ``ReferenceDDE``, of whitened points.
    """

    def __init__(self, n_components="auto", max_steps="auto", random_state=None, verbose=False):
        self.n_components = n_components
        self.max_steps = max_steps
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y=None, validation_data=None):
        """Fit the density to the rows of X (n, d); ``validation_data`` (m, d) are to choose by, ``y`` is ignored."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=3)
        for name in ("n_components", "max_steps"):
            if (value := getattr(self, name)) != "auto":
                checks.check_integer(f'{name}, unless it is "auto",', value, smallest=int(name == "n_components"))
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.whitening_ = Whitening(X, getattr(self, "feature_names_in_", np.arange(X.shape[1])))
        x = self.whitening_.whiten(X)
        crosses = len(x) <= MOST_ROWS_TO_CROSS and x.size <= MOST_NUMBERS_TO_CROSS
        if validation_data is None:
            x = np.random.default_rng(self._seed).permutation(x)
            size = min(-(-len(x) // NUM_FOLDS), MOST_ROWS_HELD_OUT)
            parts = [slice(i, i + size) for i in range(0, len(x) if crosses else 1, size)]
            folds = [(np.delete(x, part, axis=0), x[part]) for part in parts]
        else:
            folds = [(x, self._whiten(validation_data))]
        self._train(*folds[0], self._choose_reference(x, folds, crosses))
        return self

    def score_samples(self, X):
        """Log densities (n,) of the rows of X (n, d), in nats."""
        return self._by_chunks(self._log_density, self._whiten(X)) + self.whitening_.log_det

    def score(self, X, y=None):
        """Mean log density of the rows of X (n, d), in nats; ``y`` is ignored."""
        return float(self.score_samples(X).mean())

    def score_gradient(self, X):
        """Gradient (n, d) of the log density at the rows of X (n, d), in nats per unit of each column."""

        def differentiate(x):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                log_density = self._log_density(x)
            return tape.gradient(log_density, x)

        return self.whitening_.pull_back(self._by_chunks(differentiate, self._whiten(X)))

    def sample(self, n_samples=1, random_state=None):
        """Draw rows (n_samples, d); those of the network are points of its mixture, drawn again by their weights."""
        check_is_fitted(self)
        rng = check_random_state(random_state)
        num = rng.binomial(checks.check_integer("n_samples", n_samples), self.network_share_)
        x = draw(self.reference_, n_samples - num, 0.0, rng.randint(2**31 - 1))
        if num:
            share = self.log_normalizer_.effective_sample_size / self.log_normalizer_.n_samples
            points = draw(self.mixture_, 1000 + int(10 * num / share), self.noise_std_, rng.randint(2**31 - 1))
            chances = softmax(self._correct(points, self.level_))
            x = rng.permutation(np.concatenate([x, points[rng.choice(len(points), num, p=chances)]]))
        return self.whitening_.restore(x)

    def _whiten(self, X):
        check_is_fitted(self)
        return self.whitening_.whiten(validate_data(self, X, dtype=np.float64, reset=False))

    def _choose_reference(self, x, folds, crosses):
        """Fit mixtures to the folds [(points, held_out)] of points x (n, d), and pool them, and kernels on the points.

        Returns the pool of the first fold, which has not seen its held-out part; ``reference_`` is that of all folds.
        """
        counts = COUNTS if self.n_components == "auto" else [self.n_components]
        kinds = (REGULARIZERS, ()) if crosses else (REGULARIZERS[:1], SUBSPACE_DIMS)  # few rows choose among fewer
        fits, log_densities = fit_candidates(folds, counts, *kinds, self._seed)
        best_fit = fits[log_densities.mean(axis=1).argmax()][0]
        bandwidth = None
        if crosses:
            of_kernels = np.concatenate([kernel_log_densities(*fold, BANDWIDTHS) for fold in folds], axis=1)
            best = of_kernels.mean(axis=1).argmax()
            log_densities = np.concatenate([log_densities, of_kernels[best : best + 1]])
            bandwidth = BANDWIDTHS[best]
        shares = find_shares(log_densities)
        shares[1:] = np.where(shares[1:] < SMALLEST_SHARE, 0.0, shares[1:])  # the first is for rows far from all others
        shares /= shares.sum()
        self.kernel_share_ = float(shares[-1]) if crosses else 0.0
        used = [(each, share) for each, share in zip(fits, shares, strict=False) if share]  # the kernels come last
        self.mixture_ = pool([(best_fit, 1.0)])
        kernels = self.kernel_share_, bandwidth
        self.reference_ = pool([(fit, share / len(each)) for each, share in used for fit in each], x, *kernels)
        return pool([(each[0], share) for each, share in used], folds[0][0], *kernels)

    def _train(self, x, held_out, reference):
        """Train the network on points x (n, d); choose its level and share by those held out (m, d)."""
        self.level_ = self.noise_std_ = self.dde_ = self.log_normalizer_ = self.log_normalizer_from_data_ = None
        self.network_share_, self.history_ = 0.0, []
        steps = int(np.clip(50 * math.sqrt(len(x)), 500, 6000)) if self.max_steps == "auto" else self.max_steps
        if len(x) + len(held_out) < FEWEST_ROWS_TO_TRAIN or not steps:
            return
        lowest = np.clip(math.sqrt(np.quantile(self.mixture_.variances, 0.05)) / 2, 0.01, 0.1)
        levels = np.geomspace(lowest, HIGHEST_LEVEL / 2, NUM_LEVELS)
        net = build_reference_net(self.mixture_, (128, 128) if len(x) < 5000 else (256, 256, 256), self._seed % 10_000)
        self.dde_ = ReferenceDDE(net, (float(lowest), HIGHEST_LEVEL), seed=self._seed)
        self.dde_.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)))
        points = draw(self.mixture_, NUM_POINTS // 4, 0.0, self._seed)

        def judge():
            constants = [weigh_up(self._correct(points, level), level) for level in levels[::2]]
            constants = [z for z in constants if z.effective_sample_size >= SMALLEST_SAMPLE_SIZE]
            return max((self._correct(held_out, z.noise_std).mean() - z.value for z in constants), default=-math.inf)

        callbacks = [KeepBest(judge)]
        if self.verbose:
            from egm_dde.visualization import ProgressBar  # it needs matplotlib

            callbacks.append(ProgressBar())
        rows = np.tile(x, (-(-BATCH_SIZE // len(x)), 1)).astype(np.float32)  # in a batch, a row meets many noises
        options = {"batch_size": BATCH_SIZE, "steps_per_epoch": STEPS_BETWEEN_CHECKS, "verbose": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of units: these are whitened
            self.dde_.fit(rows, epochs=-(-steps // STEPS_BETWEEN_CHECKS), callbacks=callbacks, **options)
        self.history_ = callbacks[0].checks
        if callbacks[0].best_step:
            self._choose_level(levels, held_out, reference)

    def _choose_level(self, levels, held_out, reference):
        """Choose the level, and the noise of the mixture, where the constant is the same from both sides."""
        noise, best = np.random.default_rng(self._seed).standard_normal(held_out.shape), -math.inf
        for level, noise_std in [(each, noise_std) for each in levels for noise_std in (0.0, each)]:
            choice = self._normalise(level, noise_std, held_out + noise_std * noise, NUM_POINTS // 4)
            if not choice[2].is_reliable:
                continue
            log_density = self._by_chunks(lambda x: self._log_network(x, *choice[:3]), held_out)  # noqa: B023
            if log_density.mean() > best:
                best, best_choice, best_log_density = log_density.mean(), choice, log_density
        if best == -math.inf:
            return
        level, noise_std, z, _ = best_choice
        num = NUM_POINTS * int(np.clip((z.standard_error / LARGEST_ERROR) ** 2 / 4, 1, 10))
        choice = self._normalise(level, noise_std, held_out + noise_std * noise, num)
        self.level_, self.noise_std_, self.log_normalizer_, self.log_normalizer_from_data_ = choice
        log_reference = self._by_chunks(lambda x: reference(x, log_levels(x, 0.0))[:, 0], held_out)
        self.network_share_ = float(find_shares(np.array([best_log_density, log_reference]))[0])

    def _normalise(self, level, noise_std, noisy_data, num):
        """The level and the noise of the mixture, and log Z from ``num`` points of the mixture and from data."""
        z = weigh_up(self._correct(draw(self.mixture_, num, noise_std, self._seed), level), float(level))
        from_data = -weigh_up(-self._correct(noisy_data, level), float(level)).value
        is_reliable = z.effective_sample_size >= SMALLEST_SAMPLE_SIZE and abs(z.value - from_data) <= LARGEST_DIFFERENCE
        return float(level), float(noise_std), z._replace(is_reliable=is_reliable), from_data

    def _by_chunks(self, function, x):
        """``by_chunks``, in chunks that bound the memory of the reference."""
        return by_chunks(function, x, int(np.clip(2**22 // math.prod(self.reference_.means.shape), 16, 2048)))

    def _correct(self, x, level):
        """The correction c (n,) at whitened points x (n, d)."""
        return by_chunks(lambda x: self.dde_.log_ratio(tf.cast(x, self.dde_.variable_dtype), level)[:, 0], x, 2048)

    def _log_network(self, x, level, noise_std, z):
        log_ratio = self.dde_.log_ratio(tf.cast(x, self.dde_.variable_dtype), level)[:, 0]
        return self.mixture_(x, log_levels(x, noise_std))[:, 0] + tf.cast(log_ratio, x.dtype) - z.value

    def _log_density(self, x):
        log_reference = self.reference_(x, log_levels(x, 0.0))[:, 0]
        if self.level_ is None:
            return log_reference
        log_network = self._log_network(x, self.level_, self.noise_std_, self.log_normalizer_)
        shares = math.log(self.network_share_), math.log1p(-self.network_share_)
        return tf.reduce_logsumexp([shares[0] + log_network, shares[1] + log_reference], axis=0)
