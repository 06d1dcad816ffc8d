import itertools
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import imageio.v3 as iio
import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from small_models import normal

from egm_dde import visualization

DATA = normal(8, 2)
POINTS = np.zeros((3, 2))


@pytest.fixture
def ax():
    return Figure(figsize=(3, 3), dpi=100).add_subplot()


def gaussian_log_density(mean=(0, 0), std=(1, 1), shift=0.0):
    """Log density of N(mean, diag(std^2)), with a constant added."""
    log_norm = np.log(2 * np.pi) + np.log(std).sum()
    return lambda points: shift - (((points - mean) / np.array(std)) ** 2).sum(axis=1) / 2 - log_norm


def render(axes):
    """The axes' figure as floats in [0, 1], (height, width, 3), first row at the bottom."""
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255


def assert_square(axes, limit):
    assert axes.get_xlim() == axes.get_ylim() == (-limit, limit)
    assert axes.get_aspect() == 1


def assert_points(axes, artists, points, labels):
    for artist, expected in zip(artists, points, strict=True):
        np.testing.assert_array_equal(artist.get_xydata(), expected)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels


@pytest.mark.parametrize("shift", [0.0, 700.0, -1e6])  # exp of the last two is not representable
def test_grid_density_is_the_normalised_density(shift):
    mean, std, limit, resolution = (0.5, -0.25), (0.5, 0.75), 5.0, 50
    density = visualization.grid_density(gaussian_log_density(mean, std, shift), limit, resolution)
    centres = -limit + 2 * limit / resolution * (np.arange(resolution) + 0.5)
    exact = np.exp(gaussian_log_density(mean, std)(np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)))
    # A Gaussian's sum over cell centres is its integral to many digits; float32 points set the tolerance.
    np.testing.assert_allclose(density, exact.reshape(resolution, resolution), rtol=1e-4, atol=1e-7)


def test_log_density_may_be_a_float32_column_tensor_and_minus_infinity():
    def right_half(points):
        assert points.dtype == np.float32 and points.shape == (16, 2)
        return keras.ops.convert_to_tensor(np.where(points[:, :1] > 0, 3.0, -np.inf))

    density = visualization.grid_density(right_half, limit=2.0, resolution=4)
    np.testing.assert_allclose(density, [[0, 0, 1 / 8, 1 / 8]] * 4)


def test_density_plot_puts_x_to_the_right_and_y_up_and_can_share_a_colour_scale(ax):
    log_density = gaussian_log_density((2.05, -1.05), (0.3, 0.3))  # the mean is a cell's centre
    image = visualization.plot_density(ax, log_density, resolution=80)
    assert_square(ax, 4.0)
    top = np.argwhere(np.abs(render(ax) - image.cmap(1.0)[:3]).max(axis=-1) < 0.1)  # (row, column) of the brightest
    x, y = ax.transData.inverted().transform(top[:, ::-1].mean(axis=0) + 0.5)
    assert (x, y) == pytest.approx((2.05, -1.05), abs=0.06)
    assert image.get_array().max() == pytest.approx(1 / (2 * np.pi * 0.3**2), rel=1e-4)
    assert image.get_clim() == (0, image.get_array().max())
    assert visualization.plot_density(ax, log_density, max_density=0.7).get_clim() == (0, 0.7)


def test_samples_keep_their_coordinates_colours_and_limits(ax):
    assert len(visualization.plot_samples(ax, [[1, 2]])) == 1 and ax.get_legend() is None  # one kind needs none
    ax.clear()
    samples = 100 * normal(2000, 2), 100 * normal(30, 2)
    artists = visualization.plot_samples(ax, *samples, limit=3.0)
    assert_points(ax, artists, samples, ["real", "generated"])
    (red, _, blue), (generated_red, _, generated_blue) = (to_rgb(artist.get_color()) for artist in artists)
    assert blue > red and generated_red > generated_blue
    assert_square(ax, 3.0)  # whatever the samples' range
    render(ax)
    assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0  # it hides no data


def test_denoising_lines_go_from_noisy_to_denoised(ax):
    noisy = normal(7, 2)
    lines = visualization.plot_denoising(ax, noisy, noisy / 2, limit=2.0)
    np.testing.assert_allclose(lines.get_segments(), np.stack([noisy, noisy / 2], axis=1))
    assert_points(ax, ax.get_lines(), [noisy, noisy / 2], ["noisy", "denoised"])
    assert len({artist.get_color() for artist in ax.get_lines()}) == 2
    assert_square(ax, 2.0)


def test_arrows_start_at_dots_and_show_the_vectors(ax):
    points, vectors = normal(9, 2), 50 * normal(9, 2, seed=1)
    arrows = visualization.plot_arrows(ax, points, keras.ops.convert_to_tensor(vectors), limit=3.0, unit=40)
    (dots,) = ax.get_lines()
    np.testing.assert_array_equal(arrows.XY, points)
    np.testing.assert_array_equal(dots.get_xydata(), points)
    drawn, lengths = np.stack([arrows.U, arrows.V], axis=1), np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(drawn, 3 / 7 * vectors / (lengths + 40), rtol=1e-6)
    assert (arrows.angles, arrows.scale_units, arrows.scale) == ("xy", "xy", 1)  # in data units
    assert_square(ax, 3.0)
    visualization.plot_arrows(ax, points, np.zeros((9, 2)))


@pytest.mark.parametrize(("sign", "log_density"), [(1, None), (-1, gaussian_log_density())])
def test_streamlines_follow_the_field_over_the_density(ax, sign, log_density):
    # The integral curves of (1, x) are y = x^2 / 2 + constant: exchanging x and y anywhere breaks them.
    def score(points):
        return keras.ops.convert_to_tensor(sign * np.stack([np.ones(len(points)), points[:, 0]], axis=1))

    streamlines = visualization.plot_score(ax, score, log_density, limit=2.0)
    densities = [] if log_density is None else [visualization.grid_density(log_density, 2.0)]
    np.testing.assert_array_equal([image.get_array() for image in ax.get_images()], densities)
    assert len(ax.patches) > 10
    segments = streamlines.lines.get_segments()
    assert all(np.ptp(y - x**2 / 2) < 0.05 for x, y in map(np.transpose, segments))
    assert np.histogram2d(*np.concatenate(segments).T, bins=4, range=[[-2, 2]] * 2)[0].all()  # they are everywhere
    for arrow in ax.patches:  # after three vertices of the shaft: wing, tip, wing
        first_wing, tip, second_wing = arrow.get_path().vertices[3:6]
        assert sign * (tip - (first_wing + second_wing) / 2)[0] > 0
    assert_square(ax, 2.0)


def noise_frames(count, height=20):
    return list(np.random.default_rng(0).integers(256, size=(count, height, 60, 3), dtype=np.uint8))


def gif_durations(path):
    """Milliseconds each frame is shown."""
    return [iio.immeta(path, index=index)["duration"] for index in range(len(iio.imread(path)))]


def test_gif_keeps_colours_timing_and_loops_for_ever(tmp_path):
    colours = [(255, 255, 255), (0, 0, 0), (1, 2, 3), (250, 128, 7)]
    frames = [np.full((20, 30, 3), colour, dtype=np.uint8) for colour in colours]
    path = tmp_path / "new" / "folder" / "plain.gif"
    for shown, durations in ((frames, [250, 250, 250, 2000]), (frames[:1], [2000])):
        visualization.write_gif(path, shown, np.divide(durations, 1000))
        np.testing.assert_array_equal(iio.imread(path).reshape(np.shape(shown)), shown)
        assert gif_durations(path) == durations and iio.immeta(path)["loop"] == 0
    visualization.write_gif(path, [frames[1], frames[1], frames[1] + 1])
    assert gif_durations(path) == [200, 100]  # equal frames are merged, in the same total time


def test_gif_palette_is_close_and_never_flickers(tmp_path):
    frames = np.zeros((3, 64, 64, 3), dtype=np.uint8)
    frames[..., 1], frames[..., 0] = (4 * np.indices((64, 64)))[:, None]
    frames[:, :32] = background = (101, 203, 0)
    frames[1, 30:40, 10:20] = frames[2, 30:40, 30:40] = 0  # a blot that moves
    visualization.write_gif(tmp_path / "gradient.gif", frames, num_colors=256)
    decoded = iio.imread(tmp_path / "gradient.gif")
    assert np.abs(decoded.astype(int) - frames).max() <= 12  # 2048 colours in 256
    assert (decoded[:, :30] == background).all()  # the most frequent colour is exact
    unchanged = (frames == frames[0]).all(axis=-1)
    assert (decoded == decoded[0]).all(axis=-1)[unchanged].all()


def test_gif_with_fewer_colours_is_smaller_and_the_same_each_time(tmp_path):
    path, found = tmp_path / "noise.gif", []
    for num_colors in (256, 16, 16):
        visualization.write_gif(path, noise_frames(5, 60), num_colors=num_colors)
        assert len(np.unique(iio.imread(path).reshape(-1, 3), axis=0)) == num_colors
        found.append(path.read_bytes())
    assert found[1] == found[2] and len(found[1]) < 0.6 * len(found[0])


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", run_eagerly=True)
    return model


def fit(model, *callbacks, **options):
    return model.fit(DATA, DATA[:, :1], batch_size=4, verbose=0, callbacks=list(callbacks), **options)


@pytest.fixture
def captions(monkeypatch):
    """The captions of all frames that are filmed."""
    captions, add_frame = [], visualization.Film.add_frame

    def recording(film, draw, *arguments, caption):
        captions.append(caption)
        add_frame(film, draw, *arguments, caption=caption)

    monkeypatch.setattr(visualization.Film, "add_frame", recording)
    return captions


def test_gif_callback_films_training(tmp_path, model, captions):
    path, weights = tmp_path / "images" / "weights.gif", [model.get_weights()[0]]
    callback = visualization.GifCallback(path, lambda _, model: weights.append(model.get_weights()[0]), 160, 8)
    fit(model, callback, epochs=6)
    assert captions == ["step 0", "step 5", "step 10", "step 12"]  # of two steps an epoch
    np.testing.assert_array_equal([weights[1], weights[-1]], [weights[0], model.get_weights()[0]])
    assert iio.imread(path).shape == (4, 171, 160, 3)
    assert len(np.unique(iio.imread(path).reshape(-1, 3), axis=0)) <= 8
    assert gif_durations(path) == [400, 150, 60, 1500]  # the first ones are shown longer
    assert list(path.parent.iterdir()) == [path]


def simulate(callback, epochs, num_steps, before_step=lambda: None, logs=None, last_logs=None):
    """Call a callback as ``fit`` does, in epochs of so many steps."""
    callback.set_params({"epochs": epochs[-1] + 1, "steps": num_steps})
    callback.on_train_begin()
    for epoch in epochs:
        callback.on_epoch_begin(epoch)
        for batch in range(num_steps):
            before_step()
            callback.on_train_batch_end(batch, logs)
    callback.on_train_end(last_logs)


@pytest.mark.parametrize("epochs", [range(100), range(2, 4)])  # the second run is resumed
def test_frames_are_spaced_like_the_logarithm_of_the_step(tmp_path, captions, epochs):
    simulate(visualization.GifCallback(tmp_path / "a.gif", Mock()), epochs, num_steps=50)
    steps, last_step = [50 * epochs[0]], 50 * epochs[-1] + 50
    while steps[-1] < last_step:
        steps.append(min(last_step, steps[-1] + max(5, -(-steps[-1] // 6))))  # a sixth, rounded up
    assert captions == [f"step {step}" for step in steps]


def test_gif_callback_can_be_used_again_also_if_training_stops_early_or_at_once(tmp_path, model, captions):
    callback = visualization.GifCallback(tmp_path / "a.gif", Mock())
    fit(model, callback, epochs=2, initial_epoch=2)
    assert captions == [] and list(tmp_path.iterdir()) == []
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 4))
    for _ in range(2):
        fit(model, callback, stop, epochs=9)
    assert captions == ["step 0", "step 5", "step 10"] * 2  # the last one is not filmed twice


def test_axes_stay_where_they_are_and_titles_are_kept():
    pyplot_figures, film, boxes, titles = plt.get_fignums(), visualization.Film(), set(), []

    def draw(axes, title):
        visualization.plot_density(axes, gaussian_log_density(), resolution=10)
        axes.set_title(title)

    for number, title in enumerate(["density", "density", ""]):
        film.add_frame(draw, title, caption=f"step {number}")
        boxes.add(film.axes.get_window_extent().bounds)
        titles.append(film.axes.get_title())
        assert len(film.axes.get_images()) == 1  # nothing is left of the frame before
    assert titles == ["density, step 0", "density, step 1", "step 2"]
    assert np.shape(film.frames) == (3, 515, 480, 3)
    ((_, _, width, height),) = boxes
    assert width == pytest.approx(height) and width > 0.95 * 480  # no stamp within wide margins
    assert not film.axes.get_xticks().size + film.axes.get_yticks().size
    assert plt.get_fignums() == pyplot_figures


def test_an_interruption_leaves_the_old_gif_and_nothing_else(tmp_path, monkeypatch, model):
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")
    draw = Mock(side_effect=[None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        fit(model, visualization.GifCallback(path, draw), epochs=9)
    monkeypatch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        visualization.write_gif(path, noise_frames(2))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="cannot be written: Is a directory"):  # before training
        fit(model, visualization.GifCallback(tmp_path, Mock(side_effect=AssertionError)))


@pytest.fixture
def shown(monkeypatch):
    """What a notebook is given to show: the text and the HTML of every update."""
    shown = []

    def show(bundle, raw, display_id=None):
        assert raw is True and (display_id is True) == (not shown)  # displayed once, updated later
        shown.append((bundle["text/plain"], bundle["text/html"]))
        return SimpleNamespace(update=show)

    notebook = SimpleNamespace(get_ipython=lambda: True, display=SimpleNamespace(display=show))
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    return shown


def test_progress_bar_shows_twice_a_second_how_long_training_takes(shown, monkeypatch):
    clock, durations = Mock(**{"monotonic.return_value": 1000.0}), itertools.chain([10.0], itertools.repeat(0.25))
    monkeypatch.setattr(visualization, "time", clock)

    def tick():
        clock.monotonic.return_value += next(durations)

    logs, last_logs = {"gen_loss": np.float32(784.3219)}, {"gen_loss": 0.123456, "loss<real>": 1234.5}
    simulate(visualization.ProgressBar(), range(101), 3, tick, logs, last_logs)
    texts, htmls = zip(*shown, strict=True)
    assert texts[:4] == (
        "epoch 1/101",  # before the first step, which sets no pace
        "epoch 1/101, gen_loss 784.3, 1 min 15 s to go",
        "epoch 2/101, gen_loss 784.3, 1 min 15 s to go",
        "epoch 2/101, gen_loss 784.3, 1 min 14 s to go",
    )
    assert "epoch 81/101, gen_loss 784.3, 15.2 s to go" in texts
    assert texts[-1] == "101 epochs in 1 min 26 s, gen_loss 0.1235, loss<real> 1234"
    assert htmls[1] == f'<div><progress value="0.0066" max="1" style="width: 20em"></progress> {texts[1]}</div>'
    assert 'value="1.0000"' in htmls[-1] and "loss&lt;real&gt;" in htmls[-1]
    fractions = [float(html.split('"')[1]) for html in htmls[1:-1]]
    np.testing.assert_allclose(fractions, np.arange(2, 303, 2) / 303, atol=1e-4)  # every second one of 303 steps


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_progress_bar_in_fit(shown, model, monkeypatch):
    monkeypatch.setattr(visualization.ProgressBar, "every_seconds", 0)
    fit(model, visualization.ProgressBar(), epochs=6, initial_epoch=3)
    texts, htmls = zip(*shown, strict=True)
    assert texts[0] == "epoch 4/6" and texts[-2].startswith("epoch 6/6, loss ")
    assert texts[-1].startswith("3 epochs in ") and ", loss " in texts[-1]
    assert 'value="0.0000"' in htmls[0] and 'value="1.0000"' in htmls[-2]
    shown.clear()
    batches = ((DATA, DATA[:, :1]) for _ in range(3))  # of unknown length
    model.fit(batches, verbose=0, shuffle=False, callbacks=[visualization.ProgressBar()])
    assert shown[0][0] == "epoch 1/1" and shown[-1][0].startswith("1 epoch in ")


def test_progress_bar_in_plain_python(model, capsys):
    fit(model, visualization.ProgressBar(), epochs=3)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("3 epochs in ") and ", loss " in line


POSITIVE = "must be a positive finite number, got"
UINT8 = r"frames must be uint8 images \(height, width, 3\) of one shape, got"
MIXED_FRAMES = noise_frames(1, 2) + noise_frames(1, 4)
BAD_CALLS = [
    (f"limit {POSITIVE} 0", "plot_samples", [POINTS], {"limit": 0}),
    ("resolution must be an integer of at least 2, got 1", "plot_density", [np.sum, 4.0, 1], {}),
    (f"max_density {POSITIVE} inf", "plot_density", [lambda x: x[:, 0]], {"max_density": np.inf}),
    (r"log_density must return shape \(n,\) or \(n, 1\), got \(9, 2\)", "plot_density", [abs], {"resolution": 3}),
    ("log_density must be .* maximum is nan", "plot_density", [lambda x: np.where(x[:, 0] > 0, np.nan, 0)], {}),
    ("log_density must be .* maximum is inf", "plot_density", [lambda x: np.where(x[:, 0] > 0, np.inf, 0)], {}),
    ("log_density must be .* maximum is -inf", "plot_density", [lambda x: np.full(len(x), -np.inf)], {}),
    ("real_samples must be real numbers", "plot_samples", [None, POINTS], {}),
    ("generated_samples must be finite", "plot_samples", [POINTS, POINTS * np.nan], {}),
    ("noisy_points and denoised_points must be equally many, got 3 and 2", "plot_denoising", [POINTS, POINTS[:2]], {}),
    (r"scores must have shape \(n, 2\), got \(1600, 1\)", "plot_score", [lambda x: x[:, :1]], {}),
    (rf"{UINT8} \[\]", "write_gif", ["a.gif", []], {}),
    (rf"{UINT8} \[\('float64', \(4, 4, 3\)\)\]", "write_gif", ["a.gif", np.zeros((2, 4, 4, 3))], {}),
    (rf"{UINT8} \[\('uint8', \(2, 60, 3\)\), \('uint8', \(4, 60, 3\)\)\]", "write_gif", ["a.gif", MIXED_FRAMES], {}),
    ("durations must be .* at least 0.02 and less than 655.355, got 0", "write_gif", ["a.gif", noise_frames(1), 0], {}),
    ("durations must be a number or 2, one a frame", "write_gif", ["a.gif", noise_frames(2), [0.1] * 3], {}),
    ("num_colors must be an integer .* got 1", "write_gif", ["a.gif", noise_frames(1)], {"num_colors": 1}),
    ("num_colors must be an integer .* got 257", "GifCallback", ["a.gif", print, 480, 257], {}),
    ("size must be an integer of at least 64 .* got 480.0", "GifCallback", ["a.gif", print, 480.0], {}),
    ("draw must be a callable", "GifCallback", ["a.gif", None], {}),
]


@pytest.mark.parametrize(("message", "name", "arguments", "options"), BAD_CALLS)
def test_bad_input_is_named(ax, message, name, arguments, options):
    with pytest.raises(ValueError, match=message):
        getattr(visualization, name)(*[ax] * name.startswith("plot_"), *arguments, **options)
    assert not ax.has_data()  # nothing half drawn
