"""Data for ``density_benchmark.ipynb``: densities that are known, real data that come with scikit-learn, local files.

* ``KnownDensity``: Gaussians, mixtures and bananas in any number of dimensions, whose density with noise is exact.
* ``load_shipped``: real data that scikit-learn brings along, split into train, val and test.
* ``load_local``: the benchmark sets POWER, GAS, HEPMASS, MINIBOONE and BSDS300 from files of yours.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn.datasets
from scipy.linalg import solve_triangular
from scipy.special import logsumexp
from sklearn.feature_extraction.image import extract_patches_2d

# Number of columns of the benchmark sets after the usual preprocessing (arXiv:1705.07057, Appendix D).
LOCAL_DATASETS = {"POWER": 6, "GAS": 8, "HEPMASS": 21, "MINIBOONE": 43, "BSDS300": 63}
SHIPPED_DATASETS = ("wine", "breast_cancer", "patches_3x3", "patches_8x8")
KNOWN_DENSITIES = ("gaussian", "mixture", "banana")

# Bounds the memory of KnownDensity.noisy_log_density: this many (point, component) pairs at a time.
_PAIRS_PER_CHUNK = 2**22


class Split(NamedTuple):
    """One data set in three parts, float64 arrays (n, d): to train on, to choose a model by, to report."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


class KnownDensity:
    """A random density in d dimensions that stays exact under linear maps and Gaussian noise.

    In coordinates h, of which the first two are special, x = mean + factor h, with a random, correlated ``factor``:

    * ``"gaussian"``: h ~ N(0, I).
    * ``"mixture"``: h ~ sum_k w_k N(m_k, I), five components with random weights and centres m_k ~ N(0, 2^2 I).
    * ``"banana"``: h ~ N(0, I), but for h_2 = 0.7 (h_1^2 - 1) + 0.5 n, n ~ N(0, 1): a curved ridge.

    The first two are mixtures of Gaussians, with noise as well. So is the banana for a given h_1: over h_1 the density
    is an integral, here a sum over nodes that lie so close that it is exact to rounding for noise of 0.1 (trapezoidal
    rule).

    Args:
        kind: one of ``KNOWN_DENSITIES``.
        dim: number of dimensions, at least 2.
        rng: ``numpy.random.Generator`` or seed, of the density itself.
    """

    def __init__(self, kind, dim, rng=None):
        if kind not in KNOWN_DENSITIES:
            raise ValueError(f"kind must be one of {', '.join(KNOWN_DENSITIES)}; got {kind!r}")
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim!r}")
        rng = np.random.default_rng(rng)
        self.kind = kind
        self.mean = rng.standard_normal(dim)
        mixing = rng.standard_normal((dim, dim)) / math.sqrt(dim)
        self.factor = np.linalg.cholesky(mixing @ mixing.T + 0.1 * np.eye(dim))  # (d, d)
        self.weights, self.centres, self.stds = np.ones(1), np.zeros((1, dim)), np.ones(dim)
        if kind == "mixture":
            self.weights, self.centres = rng.dirichlet(np.full(5, 5.0)), 2.0 * rng.standard_normal((5, dim))
        if kind == "banana":
            nodes = np.arange(-9, 9, 0.025)
            self.weights = np.exp(-(nodes**2) / 2) / np.exp(-(nodes**2) / 2).sum()
            self.centres = np.zeros((len(nodes), dim))
            self.centres[:, 0], self.centres[:, 1] = nodes, 0.7 * (nodes**2 - 1)
            self.stds = np.array([0.0, 0.5, *np.ones(dim - 2)])

    def sample(self, n_samples, rng=None):
        """Draw points (n_samples, d), float64."""
        rng = np.random.default_rng(rng)
        noise = rng.standard_normal((n_samples, len(self.mean)))
        if self.kind == "banana":  # h_1 from all numbers, not from the nodes of the sum
            h = self.stds * noise
            h[:, 0] = noise[:, 0]
            h[:, 1] += 0.7 * (noise[:, 0] ** 2 - 1)
        else:
            h = self.centres[rng.choice(len(self.weights), n_samples, p=self.weights)] + noise
        return self.mean + h @ self.factor.T

    def noisy_log_density(self, y, noise_std, mean, matrix):
        """Exact log density (n,) of y = matrix (x - mean) + noise_std * N(0, I), in nats.

        Args:
            y: points (n, d).
            noise_std: standard deviation of the noise; for the banana, at least about 0.1.
            mean: (d,).
            matrix: (d, d), the linear map.
        """
        matrix = np.asarray(matrix)
        factor = matrix @ self.factor
        centres = matrix @ (self.mean - mean) + self.centres @ factor.T  # (components, d)
        covariance = (factor * self.stds**2) @ factor.T + noise_std**2 * np.eye(len(matrix))
        root = np.linalg.cholesky(covariance)
        y, centres = (solve_triangular(root, points.T, lower=True).T for points in (np.asarray(y, float), centres))
        log_weights = np.log(self.weights) - (centres**2).sum(axis=1) / 2
        log_density = np.empty(len(y))
        rows = max(1, _PAIRS_PER_CHUNK // len(centres))
        for start in range(0, len(y), rows):
            chunk = y[start : start + rows]
            log_density[start : start + rows] = logsumexp(chunk @ centres.T + log_weights, axis=1)
        normalizer = np.log(np.diag(root)).sum() + len(root) / 2 * math.log(2 * math.pi)
        return log_density - (y**2).sum(axis=1) / 2 - normalizer


def load_shipped(name, rng=0):
    """Load real data that come with scikit-learn: nothing is downloaded.

    * ``"wine"``, ``"breast_cancer"``: 178 wines by 13 and 569 tumours by 30 measurements, shuffled, split 60/20/20.
    * ``"patches_3x3"``, ``"patches_8x8"``: grey patches of its two sample photographs, in 8 and 63 dimensions, made as
      those of BSDS300 are: uniform noise that undoes the rounding, scaled to [0, 1], the mean of each patch subtracted
      and its last pixel dropped (arXiv:1306.0186). Train, val and test come from separate parts of the photographs:
      the left 70 %, the next 10 % and the right 20 %.

    Args:
        name: one of ``SHIPPED_DATASETS``.
        rng: ``numpy.random.Generator`` or seed.

    Returns:
        ``Split(train, val, test)``.
    """
    if name not in SHIPPED_DATASETS:
        raise ValueError(f"name must be one of {', '.join(SHIPPED_DATASETS)}; got {name!r}")
    rng = np.random.default_rng(rng)
    if name.startswith("patches"):
        return _load_patches(int(name[-1]), rng)
    x = getattr(sklearn.datasets, f"load_{name}")().data
    x = x[rng.permutation(len(x))]
    first, second = int(0.6 * len(x)), int(0.8 * len(x))
    return Split(x[:first], x[first:second], x[second:])


def _load_patches(size, rng):
    photographs = [photograph.mean(axis=-1) for photograph in sklearn.datasets.load_sample_images().images]

    def cut(left, right, num_patches):
        parts = []
        for grey in photographs:
            width = grey.shape[1]
            part = grey[:, int(left * width) : int(right * width)]
            seed = int(rng.integers(2**31))
            patches = extract_patches_2d(part, (size, size), max_patches=num_patches // 2, random_state=seed)
            parts.append(patches.reshape(len(patches), -1))
        x = rng.permutation(np.concatenate(parts))
        x = (x + rng.random(x.shape)) / 256
        return (x - x.mean(axis=1, keepdims=True))[:, :-1]

    return Split(cut(0, 0.7, 200_000), cut(0.7, 0.8, 5_000), cut(0.8, 1, 5_000))


def load_local(name, folder):
    """Load a benchmark set from files.

    They are ``<folder>/<NAME>.npz`` with the arrays ``train``, ``val`` and ``test``, or ``<folder>/<NAME>/train.npy``,
    ``val.npy`` and ``test.npy``, each (n, d), preprocessed as usual (arXiv:1705.07057, Appendix D).

    Args:
        name: one of ``LOCAL_DATASETS``.
        folder: where the files are.

    Returns:
        ``Split(train, val, test)``.

    Raises:
        FileNotFoundError: if a file is missing; it says what belongs where.
        ValueError: for an unknown name, or arrays that are missing, of the wrong shape, or not finite.
    """
    if name not in LOCAL_DATASETS:
        raise ValueError(f"name must be one of {', '.join(LOCAL_DATASETS)}; got {name!r}")
    archive, parts = Path(folder) / f"{name}.npz", Path(folder) / name
    paths = {part: parts / f"{part}.npy" for part in Split._fields}
    if archive.exists():
        with np.load(archive) as arrays:
            missing = set(Split._fields) - set(arrays.files)
            if missing:
                raise ValueError(
                    f"{archive} must hold the arrays train, val and test; it lacks {', '.join(sorted(missing))}"
                )
            split = [arrays[part] for part in Split._fields]
    elif all(path.exists() for path in paths.values()):
        split = [np.load(path) for path in paths.values()]
    else:
        raise FileNotFoundError(
            f"{name} needs {archive} with the arrays train, val and test, or {parts}/ with train.npy, val.npy and "
            f"test.npy; each (n, {LOCAL_DATASETS[name]}), preprocessed as in arXiv:1705.07057"
        )
    for part, x in zip(Split._fields, split, strict=True):
        if x.ndim != 2 or x.shape[1] != LOCAL_DATASETS[name] or not len(x):
            raise ValueError(f"{part} of {name} must have shape (n, {LOCAL_DATASETS[name]}), got {x.shape}")
        if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
            raise ValueError(f"{part} of {name} must be made of finite numbers")
    return Split(*(x.astype(np.float64) for x in split))
