"""Data for ``density_benchmark.ipynb``: densities that are known, real data that come with scikit-learn, local files.

* ``KnownDensity``: Gaussians, mixtures and bananas in any number of dimensions, whose density is exact.
* ``load_shipped``: real tables that scikit-learn brings along, split at random.
* ``load_local``: a table from a file of yours.
"""

import math
from typing import NamedTuple

import numpy as np
import sklearn.datasets
from scipy.linalg import solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.model_selection import train_test_split

from egm_dde.whitening import find_step

SHIPPED_DATASETS = ("iris", "wine", "diabetes", "breast_cancer", "digits", "colours", "patches_3x3", "patches_8x8")
KNOWN_DENSITIES = ("gaussian", "mixture", "banana")


class Split(NamedTuple):
    """One table in two parts, float64 arrays (n, d): to fit and to choose settings by, and to report."""

    train: np.ndarray
    test: np.ndarray


class KnownDensity:
    """A random density in d dimensions that can be evaluated exactly.

    In coordinates h, of which the first two are special, x = mean + factor h, with a random, correlated ``factor``:

    * ``"gaussian"``: h ~ N(0, I).
    * ``"mixture"``: h ~ sum_k w_k N(m_k, I), five components with random weights and centres m_k ~ N(0, 2^2 I).
    * ``"banana"``: h ~ N(0, I), but for h_2 = 0.7 (h_1^2 - 1) + 0.5 n, n ~ N(0, 1): a curved ridge.

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
        self.weights, self.centres = np.ones(1), np.zeros((1, dim))
        if kind == "mixture":
            self.weights, self.centres = rng.dirichlet(np.full(5, 5.0)), 2.0 * rng.standard_normal((5, dim))

    def sample(self, n_samples, rng=None):
        """Draw points (n_samples, d), float64."""
        rng = np.random.default_rng(rng)
        noise = rng.standard_normal((n_samples, len(self.mean)))
        h = self.centres[rng.choice(len(self.weights), n_samples, p=self.weights)] + noise
        if self.kind == "banana":
            h[:, 1] = 0.7 * (h[:, 0] ** 2 - 1) + 0.5 * h[:, 1]
        return self.mean + h @ self.factor.T

    def log_density(self, x):
        """Exact log densities (n,) at points x (n, d), in nats."""
        h = solve_triangular(self.factor, (np.asarray(x) - self.mean).T, lower=True).T
        log_det = np.log(np.diag(self.factor)).sum()
        if self.kind == "banana":
            h[:, 1] = (h[:, 1] - 0.7 * (h[:, 0] ** 2 - 1)) / 0.5
            log_det += math.log(0.5)
        exponents = -cdist(h, self.centres, "sqeuclidean") / 2
        return logsumexp(exponents, b=self.weights, axis=1) - len(self.mean) / 2 * math.log(2 * math.pi) - log_det


def load_shipped(name, rng=0):
    """Load a real table that comes with scikit-learn: nothing is downloaded.

    * ``"iris"``, ``"wine"``, ``"diabetes"``, ``"breast_cancer"``: 150 flowers by 4, 178 wines by 13, 442 patients by 9
      (without their sex, which has two values) and 569 tumours by 30 measurements; a fifth of them is for the test.
    * ``"digits"``: 1797 images of digits, their first ten principal components; a fifth is for the test.
    * ``"colours"``: red, green and blue of 5000 pixels of a photograph, 2000 of them for the test.
    * ``"patches_3x3"``, ``"patches_8x8"``: grey patches of two photographs, in 8 and 63 dimensions, made as those of
      BSDS300 are: scaled to [0, 1], the mean of each patch subtracted and its last pixel dropped (arXiv:1306.0186).
      5000 or 20,000 to train come from the left 80 % of the photographs, 5000 to test from the rest.

    A density of rounded values has no limit, so uniform noise undoes the rounding: it is as wide as a step of a column
    whose values lie in steps of one size.

    Args:
        name: one of ``SHIPPED_DATASETS``.
        rng: ``numpy.random.Generator`` or seed.

    Returns:
        ``Split(train, test)``.
    """
    if name not in SHIPPED_DATASETS:
        raise ValueError(f"name must be one of {', '.join(SHIPPED_DATASETS)}; got {name!r}")
    rng = np.random.default_rng(rng)
    if name.startswith("patches"):
        return _load_patches(int(name[-1]), rng)
    if name == "colours":
        x = rng.permutation(sklearn.datasets.load_sample_image("china.jpg").reshape(-1, 3))[:5000].astype(np.float64)
    elif name == "digits":
        x = PCA(10, svd_solver="full").fit_transform(sklearn.datasets.load_digits().data)
    elif name == "diabetes":
        x = np.delete(sklearn.datasets.load_diabetes(scaled=False).data, 1, axis=1)
    else:
        x = getattr(sklearn.datasets, f"load_{name}")().data
    x = x + np.array([find_step(column) or 0.0 for column in x.T]) * rng.random(x.shape)
    seed = int(rng.integers(2**31))
    return Split(*train_test_split(x, test_size=0.4 if name == "colours" else 0.2, random_state=seed))


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

    return Split(cut(0, 0.8, 5000 if size == 3 else 20_000), cut(0.8, 1, 5000))


def load_local(path):
    """Load a table from an ``.npz`` file with the arrays ``train`` and ``test``, both (n, d), and perhaps ``val``.

    Rows of ``val`` join those of ``train``: every method holds rows back as it likes.

    Raises:
        ValueError: for arrays that are missing, of different widths, or not finite.
    """
    with np.load(path) as arrays:
        if missing := {"train", "test"} - set(arrays.files):
            raise ValueError(f"{path} must hold the arrays train and test; it lacks {', '.join(sorted(missing))}")
        parts = {name: arrays[name] for name in ("train", "val", "test") if name in arrays.files}
    for name, x in parts.items():
        if x.ndim != 2 or x.shape[1:] != parts["train"].shape[1:] or not len(x):
            raise ValueError(f"{name} of {path} must have shape (n, d), the same d for all; got {x.shape}")
        if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
            raise ValueError(f"{name} of {path} must be made of finite numbers")
    test = parts.pop("test")
    return Split(np.concatenate(list(parts.values())).astype(np.float64), test.astype(np.float64))
