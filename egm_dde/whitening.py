"""Tables of numbers in units of their own: which columns vary, how wide they are, and what a density of them may be."""

import warnings

import numpy as np
from sklearn.covariance import ledoit_wolf

SMALLEST_VARIANCE = 1e-10  # of a direction, in squared standard deviations of the columns


class Whitening:
    """The linear map of the rows X (n, d) of a table to points x (n, m) of mean 0 and covariance I.

    The m columns that vary have a density; constant ones are left out. Few rows know little of narrow directions, so
    with less than five rows a column the covariance is shrunk (Ledoit and Wolf 2004). UserWarnings tell of columns
    without a density: constant, in steps of one size, or functions of others.

    Args:
        X: rows (n, d), float64.
        names: of the columns, (d,).
    """

    def __init__(self, X, names):
        self.constants, self.varies = X[0].copy(), np.ptp(X, axis=0) > 1e-12 * np.abs(X).max(axis=0)
        if not self.varies.any():
            raise ValueError(f"X must have rows that differ, got {len(X)} alike")
        if not self.varies.all():
            warn(f"constant columns are left out of the density: {', '.join(map(str, names[~self.varies]))}")
        x = X[:, self.varies]
        steps = zip(names[self.varies], map(find_step, x.T), strict=True)
        if steps := [f"{name} ({step:.4g})" for name, step in steps if step]:
            why = "the density of rounded values has no limit, so add uniform noise as wide as a step"
            warn(f"columns have values in steps of one size, {', '.join(steps)}: {why}")
        self.mean, std = x.mean(axis=0), x.std(axis=0)
        x = (x - self.mean) / std
        covariance = ledoit_wolf(x, assume_centered=True)[0] if len(x) < 5 * x.shape[1] else x.T @ x / len(x)
        variances, axes = np.linalg.eigh(covariance)
        if variances[0] < SMALLEST_VARIANCE:
            why = "so the density has no limit; directions narrower than 1e-5 standard deviations count as that wide"
            warn(f"some columns follow from others, {why}")
        self.matrix = axes / np.sqrt(np.maximum(variances, SMALLEST_VARIANCE)) / std[:, None]
        self.log_det = np.linalg.slogdet(self.matrix)[1]  # log density of X = that of x + log_det

    def whiten(self, X):
        """Map rows (n, d) to points (n, m)."""
        return (X[:, self.varies] - self.mean) @ self.matrix

    def restore(self, x):
        """Map points (n, m) to rows (n, d)."""
        X = np.tile(self.constants, (len(x), 1))
        X[:, self.varies] = self.mean + x @ np.linalg.inv(self.matrix)
        return X

    def pull_back(self, gradient):
        """Map gradients (n, m) with respect to points to those (n, d) with respect to rows."""
        result = np.zeros((len(gradient), len(self.varies)))
        result[:, self.varies] = gradient @ self.matrix.T
        return result


def find_step(column):
    """The step of one size in which the values (n,) of a column lie, if each occurs twice on average; None else."""
    values = np.unique(column)
    if not 2 < len(values) <= len(column) / 2:
        return None
    step = np.diff(values).min()
    multiples = np.diff(values) / step
    return step if np.allclose(multiples, np.round(multiples), rtol=0, atol=0.01) else None


def warn(message):
    """Warn the caller of the method that makes a ``Whitening``."""
    warnings.warn(message, stacklevel=4)
