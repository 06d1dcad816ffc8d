"""Pictures of two-dimensional densities, samples and scores, and callbacks that show how training goes.

Every ``plot_`` function draws one thing on ``ax``, a Matplotlib ``Axes``, and returns what it drew, on the square
[-limit, limit]^2 in data units. ``resolution`` is the number of cells of a grid along each axis. Models come in as
arguments: anything that maps float32 points (n, 2) to log densities (n,) or (n, 1), known up to a constant, or to
scores (n, 2). Arrays of points are finite, (n, 2), in data units. All functions raise ValueError for other arguments.
"""

import html
import math
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from egm_dde.checks import check_integer, check_interval, check_points, check_positive, format_duration, log_densities
from egm_dde.files import check_writable, replacing

BLUE = "#0072b2"  # with vermilion, a pair that every kind of colour vision tells apart
VERMILION = "#d55e00"


def grid_density(log_density, limit=4.0, resolution=100):
    """Probability per unit area, (resolution, resolution) [row of y, column of x], both ascending, at cells' centres.

    Its sum times the area of a cell is 1. The log density may be minus infinity where the density is zero.
    """
    values = log_densities(log_density, _grid_points(limit, resolution))
    density = np.exp(values - values.max()).reshape(resolution, resolution)
    return density / (density.sum() * (2 * limit / resolution) ** 2)


def plot_density(ax, log_density, limit=4.0, resolution=100, max_density=None):
    """Draw a density, normalised by ``grid_density``, and return the ``AxesImage``.

    The colour scale ends at ``max_density``, so that plots can share one, or at the highest density drawn.
    """
    if max_density is not None:
        check_positive("max_density", max_density)
    density = grid_density(log_density, limit, resolution)
    style = {"cmap": "viridis", "interpolation": "bilinear", "extent": (-limit, limit, -limit, limit)}
    image = ax.imshow(density, vmin=0, vmax=max_density, origin="lower", **style)  # the first row has the lowest y
    _frame_square(ax, limit)
    return image


def plot_samples(ax, real_samples, generated_samples=None, limit=4.0):
    """Draw samples as points, real ones in blue, generated ones in vermilion; return their ``Line2D``, real first."""
    check_positive("limit", limit)
    samples = {(BLUE, "real"): check_points("real_samples", real_samples, (2,), "float64")}
    if generated_samples is not None:
        samples[VERMILION, "generated"] = check_points("generated_samples", generated_samples, (2,), "float64")
    artists = [_plot_points(ax, points, *kind) for kind, points in samples.items()]
    _frame_square(ax, limit, has_legend=len(artists) > 1)
    return artists


def plot_score(ax, score, log_density=None, limit=4.0, resolution=40):
    """Draw the streamlines of a score field, over the density if it is given; return the ``StreamplotSet``."""
    points = _grid_points(limit, resolution)
    points, scores = _check_pairs(limit, points=points, scores=score(points))
    if log_density is not None:
        plot_density(ax, log_density, limit)
    x, y, u, v = np.hstack([points, scores]).reshape(resolution, resolution, 4).transpose(2, 0, 1)
    color = BLUE if log_density is None else "white"
    streamlines = ax.streamplot(x, y, u, v, color=color, linewidth=0.7, arrowsize=0.7)
    _frame_square(ax, limit)
    return streamlines


def plot_arrows(ax, points, vectors, limit=4.0, unit=1.0):
    """Draw an arrow from a dot at each point, such as grad log p~ - grad log q~, vectors (n, 2); return the ``Quiver``.

    A vector of length v is drawn limit / 7 * v / (v + unit) long: long ones stay short, and plots share a scale.
    """
    points, vectors = _check_pairs(limit, points=points, vectors=vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    arrows = limit / 7 * vectors / (lengths + check_positive("unit", unit))
    ax.plot(*points.T, "o", color="black", markersize=1.2, markeredgewidth=0)
    style = {"width": 0.005, "headwidth": 3.5, "headlength": 3.5, "headaxislength": 3.2, "minlength": 0}
    quiver = ax.quiver(*points.T, *arrows.T, angles="xy", scale_units="xy", scale=1, **style)
    _frame_square(ax, limit)
    return quiver


def plot_denoising(ax, noisy_points, denoised_points, limit=4.0):
    """Draw the segment from each noisy point to the denoised one in the same row; return the ``LineCollection``."""
    noisy, denoised = _check_pairs(limit, noisy_points=noisy_points, denoised_points=denoised_points)
    moves = np.stack([noisy, denoised], axis=1)  # (n, 2 ends, 2)
    lines = ax.add_collection(LineCollection(moves, colors="0.6", linewidths=0.6, zorder=1))
    _plot_points(ax, noisy, VERMILION, "noisy")
    _plot_points(ax, denoised, BLUE, "denoised")
    _frame_square(ax, limit, has_legend=True)
    return lines


def write_gif(path, frames, durations=0.1, num_colors=64):
    """Write uint8 RGB frames (n, height, width, 3) as an endlessly looping GIF, all or nothing.

    ``durations`` are seconds, one number or one a frame; equal frames in a row are merged. All share one palette of
    ``num_colors``, 2 to 256, so that colours are steady; fewer make a smaller file. Missing parent folders are made.
    """
    check_integer("num_colors", num_colors, 2, 257)
    kinds = {(np.asarray(frame).dtype.name, np.shape(frame)) for frame in frames}
    if len(kinds) != 1 or any(kind != "uint8" or len(shape) != 3 or shape[2] != 3 for kind, shape in kinds):
        raise ValueError(f"frames must be uint8 images (height, width, 3) of one shape, got {sorted(kinds)}")
    if np.shape(durations) not in ((), (len(frames),)):
        raise ValueError(f"durations must be a number or {len(frames)}, one a frame, got {np.shape(durations)}")
    seconds = np.broadcast_to(durations, len(frames)).tolist()
    # Viewers slow shorter frames down than the lower bound; the upper one is the format's.
    milliseconds = [10 * round(100 * check_interval("durations", each, 0.02, 655.355)) for each in seconds]
    # Unchanged pixels become transparent; loop 0 is for ever; with save_all Pillow takes a list also for one frame.
    options = {"extension": ".gif", "duration": milliseconds, "optimize": True, "loop": 0, "save_all": True}
    frames = np.stack(frames)
    tall = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))  # all frames, one below the other
    # Maximum coverage keeps the shades of a small bright mode, which median cut leaves to the background.
    reduced = tall.quantize(num_colors, Image.Quantize.MAXCOVERAGE, kmeans=1)
    indices = list(np.asarray(reduced).reshape(frames.shape[:3]))
    encoded = iio.imwrite("<bytes>", indices, palette=bytes(reduced.getpalette()), **options)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


class Film:
    """Square pictures, ``size`` pixels wide, below a caption: drawn one after the other on one figure."""

    def __init__(self, size=480):
        dpi = check_integer("size", size, 64, 2049) / 4.8
        self.canvas = FigureCanvasAgg(Figure(figsize=(4.8, 5.15), dpi=dpi, layout="none"))
        self.axes = self.canvas.figure.add_axes((0.01, 0.01, 0.98, 0.98 * 4.8 / 5.15))
        self.frames = []

    def add_frame(self, draw, *arguments, caption=""):
        """Draw ``draw(axes, *arguments)`` on empty axes, without ticks, and append ``caption`` to its title."""
        self.axes.clear()
        draw(self.axes, *arguments)
        self.axes.set(xticks=[], yticks=[])
        self.axes.set_title(", ".join(text for text in (self.axes.get_title(), caption) if text), fontsize=14)
        self.canvas.draw()
        self.frames.append(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


class GifCallback(keras.callbacks.Callback):
    """Film ``draw(ax, model)`` during ``fit`` and write it as a GIF when training ends.

    The first frame shows the model before training and the last one after it. In between, the next one comes after a
    sixth more steps, and 5 at least, because most happens early; early frames are shown longer, too. An interrupted
    run leaves an existing file as it was. A path that cannot be written raises OSError before training.

    Args:
        path, draw: the GIF, and the callable that draws the ``keras.Model`` on square, empty ``Axes``.
        size: width of the picture in pixels, 64 to 2048; a line for the caption adds 7 % to the height.
        num_colors: size of the palette, 2 to 256. 40 frames of 480 pixels with 24 colours are 0.6 to 1 MB.
    """

    def __init__(self, path, draw, size=480, num_colors=64):
        super().__init__()
        if not callable(draw):
            raise ValueError(f"draw must be a callable draw(ax, model), got {draw!r}")
        self.path, self.draw = Path(path), draw
        self.size = check_integer("size", size, 64, 2049)
        self.num_colors = check_integer("num_colors", num_colors, 2, 257)

    def on_train_begin(self, logs=None):
        check_writable(self.path)
        self._film = Film(self.size)

    def on_epoch_begin(self, epoch, logs=None):
        if not self._film.frames:  # the first epoch of this run, which is not 0 in a resumed one
            self._step = epoch * (self.params["steps"] or 0)
            self._add_frame()
        self._step_of_epoch = self._step

    def on_train_batch_end(self, batch, logs=None):
        self._step = self._step_of_epoch + batch + 1
        if self._step >= self._frame_step + max(5, math.ceil(self._frame_step / 6)):
            self._add_frame()

    def on_train_end(self, logs=None):
        if not self._film.frames:  # there was nothing to train
            return
        if self._frame_step != self._step:
            self._add_frame()
        durations = [*np.geomspace(0.4, 0.06, len(self._film.frames) - 1), 1.5]  # seconds
        write_gif(self.path, self._film.frames, durations, self.num_colors)

    def _add_frame(self):
        self._film.add_frame(self.draw, self.model, caption=f"step {self._step}")
        self._frame_step = self._step


class ProgressBar(keras.callbacks.Callback):
    """Show epoch, losses and time to go in one notebook output, twice a second at most; ``fit(verbose=0)``.

    Outside a notebook only the final state is shown, as a line of text.
    """

    every_seconds = 0.5

    def on_train_begin(self, logs=None):
        self._start = self._latest = time.monotonic()
        self._first_epoch = self._handle = self._pace_start = None
        ipython = sys.modules.get("IPython")  # a notebook has imported it
        self._display = ipython.display.display if ipython and ipython.get_ipython() else None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        if self._first_epoch is None:  # not 0 in a resumed run
            self._first_epoch = epoch
            self._show(0.0, f"epoch {epoch + 1}/{self.params['epochs']}", {})

    def on_train_batch_end(self, batch, logs=None):
        now = time.monotonic()
        if self._pace_start is None:  # the first step does not count: it waits for the graph
            self._pace_start = now, batch + 1
        elif self.params["steps"] and now >= self._latest + self.every_seconds:
            self._latest = now
            steps_made = (self._epoch - self._first_epoch) * self.params["steps"] + batch + 1
            num_steps = (self.params["epochs"] - self._first_epoch) * self.params["steps"]
            pace = (now - self._pace_start[0]) / max(1, steps_made - self._pace_start[1])  # seconds a step
            ending = f", {format_duration(pace * (num_steps - steps_made))} to go"
            self._show(steps_made / num_steps, f"epoch {self._epoch + 1}/{self.params['epochs']}", logs, ending)

    def on_train_end(self, logs=None):
        if self._first_epoch is None:  # there was nothing to train
            return
        num_epochs = self._epoch + 1 - self._first_epoch
        duration = format_duration(time.monotonic() - self._start)
        self._show(1.0, f"{num_epochs} epoch{'s' * (num_epochs != 1)} in {duration}", logs or {}, is_last=True)

    def _show(self, fraction, heading, logs, ending="", is_last=False):
        text = ", ".join([heading, *(f"{name} {float(value):.4g}" for name, value in logs.items())]) + ending
        bar = f'<progress value="{fraction:.4f}" max="1" style="width: 20em"></progress>'
        shown = {"text/plain": text, "text/html": f"<div>{bar} {html.escape(text)}</div>"}
        if self._handle is not None:
            self._handle.update(shown, raw=True)
        elif self._display is not None:
            self._handle = self._display(shown, raw=True, display_id=True)
        elif is_last:
            print(text)


def _grid_points(limit, resolution):
    """Centres (resolution^2, 2), float32, of a square grid's cells; x runs fastest, and both ascend."""
    check_positive("limit", limit)
    check_integer("resolution", resolution, 2)
    centres = (2 * np.arange(resolution) + 1 - resolution) * (limit / resolution)
    x, y = np.meshgrid(centres, centres)  # (resolution, resolution), row = y
    return np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float32)


def _plot_points(ax, points, color, label):
    style = {"markersize": 1.6 if len(points) > 500 else 3.0, "markeredgewidth": 0, "alpha": 0.6}
    return ax.plot(*points.T, "o", color=color, label=label, **style)[0]


def _frame_square(ax, limit, has_legend=False):
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    if has_legend:  # below the axes, where it hides no data
        legend = ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=2, ncols=2, frameon=False)
        for handle in legend.legend_handles:
            handle.set(markersize=6, alpha=1)


def _check_pairs(limit, **clouds):
    check_positive("limit", limit)
    one, other = (check_points(name, points, (2,), "float64") for name, points in clouds.items())
    if len(one) != len(other):
        raise ValueError(f"{' and '.join(clouds)} must be equally many, got {len(one)} and {len(other)}")
    return one, other
