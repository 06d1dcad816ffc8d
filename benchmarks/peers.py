"""Our recipe and peers at equal cost: the same points, the same metric code, the same CPU seconds on one core.

* ``ours``: ``train_models.train_egm``, as long as the budget allows; the building of its graph counts.
  ``ours-corrected``: the same generator, its points corrected by its two densities.
* ``spline-flow``: the neural spline flow of the library zuko, by maximum likelihood.
* ``flow-matching``: the library flow_matching, sampled with 1 to 20 steps of the midpoint rule.
* ``wgan-gp``: a Wasserstein GAN with gradient penalty.
* ``drifting``: a one-step generator that follows a kernel field between real and generated points.

A warm-up finds the steps that fill a budget; learning rates fall until they are done, those of the peers to zero along
a cosine. Each run has a process of its own, with one thread, and replaces its lines of ``peers.csv``. The picture shows
all of them, the tables those of the largest budget, and a summary their ranges.

    python benchmarks/peers.py [--methods ours ...] [--datasets rings ...] [--seeds 0 ...] [--budgets 30 60 120]
"""

import argparse
import itertools
import math
import multiprocessing
import sys
from functools import partial
from pathlib import Path
from time import process_time  # of all threads, whatever else the machine does

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "examples")]

from egm_dde.runtime import prepare_process

prepare_process()  # before PyTorch or TensorFlow is imported: both profit from the allocator

import numpy as np
import report
import torch
import zuko
from flow_matching.path import CondOTProbPath
from flow_matching.solver import ODESolver
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from samples import NOISE_STD, measure
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from egm_dde import evaluation
from utils import DATASETS, noisy_density_2d, sample_2d_data

NUM_POINTS = 1_024_000  # as many as train_models.make_batches draws
GRID_LIMIT, GRID_CELL = 5.0, 0.05  # of the densities that noise is added to
CHUNK_SIZE = 8192  # points drawn at a time: larger temporaries than 32 MiB cost page faults
COLUMNS = ("tv", "tv_floor", "kl", "kl_floor", "sliced_w1_ratio", "density_tv", "density_kl")
COLUMNS += ("training_seconds", "sampling_seconds", "evaluations")  # sampling: of a million points


class Descent:
    """Adam on a network, with a learning rate that falls to zero along a cosine."""

    def __init__(self, network, learning_rate, num_steps, betas=(0.9, 0.999), max_norm=math.inf):
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, learning_rate, betas)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)
        self.max_norm = max_norm

    def step(self, loss):  # of this network alone
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.grad = gradient
        if self.max_norm < math.inf:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.schedule.step()


class Peer:
    """A method in PyTorch: ``step`` trains on points (points_per_step, 2), ``sample`` generates points (n, 2)."""

    evaluations = 1  # of a network, for one sample
    log_density = None  # of the data without noise, where the method has one: points (n, 2) -> (n,)

    def get_samplers(self):
        """Return ``{end of the name: (network evaluations a sample, callable n -> points (n, 2))}``."""
        return {"": (self.evaluations, self.sample)}


class SplineFlow(Peer):
    """A neural spline flow (arXiv:1906.04032), autoregressive: a transform is inverted in one pass a coordinate."""

    points_per_step, learning_rate = 2048, 5e-3
    evaluations = 8  # two coordinates of four transforms

    def __init__(self, num_steps, learning_rate):
        self.flow = zuko.flows.NSF(2, transforms=4, bins=16, hidden_features=(128, 128))
        self.descent = Descent(self.flow, learning_rate, num_steps, max_norm=1.0)

    def step(self, x):
        self.descent.step(-self.log_density(x).mean())

    def log_density(self, x):
        return self.flow().log_prob(x)

    def sample(self, n_samples):
        return self.flow().sample((n_samples,))


class FlowMatching(Peer):
    """Flow matching (arXiv:2210.02747) along straight lines from a standard normal distribution.

    As ours, its network sees random Fourier features of the point, damped by the noise in it, of standard deviation
    1 - t, and samples come from averages of its weights.
    """

    points_per_step, learning_rate = 1024, 3e-3
    width, num_features, feature_scale, average_decay, density_steps = 256, 64, 3.0, 0.998, 10

    def __init__(self, num_steps, learning_rate):
        self.frequencies = self.feature_scale * torch.randn(2, self.num_features)
        self.network = build_mlp(3 + 2 * self.num_features, (self.width,) * 4, nn.SiLU)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(self.average_decay))
        self.solver = ODESolver(partial(self.velocity, self.average))
        self.descent = Descent(self.network, learning_rate, num_steps)

    def velocity(self, network, x, t):
        phases, t = x @ self.frequencies, t.expand(len(x))[:, None]
        damping = torch.exp(-((1 - t) ** 2) * self.frequencies.square().sum(dim=0) / 2)  # (n, num_features)
        return network(torch.cat([x, t, damping * phases.sin(), damping * phases.cos()], dim=-1))

    def step(self, x):
        path = CondOTProbPath().sample(x_0=torch.randn_like(x), x_1=x, t=torch.rand(len(x)))
        self.descent.step((self.velocity(self.network, path.x_t, path.t) - path.dx_t).square().mean())
        self.average.update_parameters(self.network)

    def log_density(self, x):
        source = zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2))
        options = {"method": "midpoint", "step_size": 1 / self.density_steps, "exact_divergence": True}
        return self.solver.compute_likelihood(x, source.log_prob, **options)[1]

    def sample(self, n_samples, num_steps):
        return self.solver.sample(torch.randn(n_samples, 2), method="midpoint", step_size=1 / num_steps)

    def get_samplers(self):
        return {f"-{n}": (2 * n, partial(self.sample, num_steps=n)) for n in (1, 5, 20)}


class WGANGP(Peer):
    """A Wasserstein GAN with its authors' settings for points in the plane (arXiv:1704.00028), but for the width."""

    learning_rate, betas = 1e-4, (0.5, 0.9)
    width, batch_size, critic_steps, penalty = 256, 256, 5, 0.1
    points_per_step = critic_steps * batch_size

    def __init__(self, num_steps, learning_rate):
        self.generator = build_mlp(2, (self.width,) * 3, nn.ReLU)
        self.critic = build_mlp(2, (self.width,) * 3, nn.ReLU, num_outputs=1)
        self.descent = Descent(self.generator, learning_rate, num_steps, self.betas)
        self.critic_descent = Descent(self.critic, learning_rate, self.critic_steps * num_steps, self.betas)

    def step(self, x):
        for real in x.chunk(self.critic_steps):
            fake = self.sample(len(real)).detach()
            mixed = torch.lerp(real, fake, torch.rand(len(real), 1)).requires_grad_()
            (gradient,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
            penalty = (gradient.norm(dim=-1) - 1).square().mean()
            self.critic_descent.step(self.critic(fake).mean() - self.critic(real).mean() + self.penalty * penalty)
        self.descent.step(-self.critic(self.sample(self.batch_size)).mean())

    def sample(self, n_samples):
        return self.generator(torch.randn(n_samples, 2))


class Drifting(Peer):
    """A generator that is trained towards its own points moved along the drift, in units of ``scale``."""

    points_per_step, learning_rate = 1024, 3e-3
    scale, temperature, latent_dim = 4.0, 0.1, 32

    def __init__(self, num_steps, learning_rate):
        self.generator = build_mlp(self.latent_dim, (256,) * 3, nn.SiLU)
        self.descent = Descent(self.generator, learning_rate, num_steps)

    def step(self, x):
        y = self.sample(len(x)) / self.scale
        target = y.detach() + self.compute_drift(y.detach(), x / self.scale)
        self.descent.step((y - target).square().mean())

    def compute_drift(self, generated, real):
        """Return the drift (n, 2): towards real points and away from generated ones, near ones most.

        Each side is weighted by the sum of the other, so that the drift vanishes where both are distributed alike.
        """
        distances = torch.cdist(generated, torch.cat([generated, real]))  # (n, 2n)
        distances.fill_diagonal_(math.inf)
        kernel = torch.exp(-distances / self.temperature)
        sums = kernel.sum(dim=0, keepdim=True) * kernel.sum(dim=1, keepdim=True)
        to_generated, to_real = (kernel * sums.clamp_min(1e-12).rsqrt()).split(len(generated), dim=1)
        attraction = to_generated.sum(dim=1, keepdim=True) * (to_real @ real)
        return attraction - to_real.sum(dim=1, keepdim=True) * (to_generated @ generated)

    def sample(self, n_samples):
        return self.scale * self.generator(torch.randn(n_samples, self.latent_dim))


PEERS = {"spline-flow": SplineFlow, "flow-matching": FlowMatching, "wgan-gp": WGANGP, "drifting": Drifting}
METHODS = ("ours", *PEERS)


def build_mlp(num_inputs, widths, activation, num_outputs=2):
    """Build dense layers."""
    layers = [(nn.Linear(*sizes), activation()) for sizes in itertools.pairwise((num_inputs, *widths))]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(widths[-1], num_outputs))


def train_peer(method, dataset, seed, budget, arguments):
    """Train within the budget; return the samplers, a log density of the noisy data or None, and numbers of the row."""
    points = torch.from_numpy(sample_2d_data(dataset, NUM_POINTS, seed))

    def train(num_steps, seconds=math.inf):
        torch.manual_seed(seed)
        peer = PEERS[method](num_steps, arguments.learning_rate or PEERS[method].learning_rate)
        peer.step(points[: peer.points_per_step])  # PyTorch sets itself up; not counted
        start, step = process_time(), 1
        while step < num_steps and process_time() - start < seconds:
            peer.step(points[torch.randint(len(points), (peer.points_per_step,))])
            step += 1
        return peer, step, process_time() - start

    torch.set_num_threads(1)
    _, steps, seconds = train(10**9, budget / 20)
    peer, steps, seconds = train(max(2, round(budget * steps / seconds)))
    numbers = {"training_seconds": seconds, "steps": steps}
    samplers = {name: (n, partial(generate, sample)) for name, (n, sample) in peer.get_samplers().items()}
    return samplers, peer.log_density and add_noise(peer.log_density), numbers


@torch.no_grad()
def generate(sample, n_samples):
    """Generate points, an array (n_samples, 2), in chunks."""
    return np.concatenate([sample(min(CHUNK_SIZE, n_samples - i)) for i in range(0, n_samples, CHUNK_SIZE)])


@torch.no_grad()
def add_noise(log_density):
    """Return the log density of noisy points: the density on a grid, filtered and interpolated."""
    axis = np.arange(GRID_CELL / 2 - GRID_LIMIT, GRID_LIMIT, GRID_CELL, dtype=np.float32)  # the middles of the cells
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2))
    density = np.concatenate([log_density(chunk).exp() for chunk in grid.split(CHUNK_SIZE)]).reshape(len(axis), -1)
    density = gaussian_filter(density.astype(float), NOISE_STD / GRID_CELL, mode="constant", truncate=8)
    return lambda x: np.log(np.maximum(map_coordinates(density, (x.T - axis[0]) / GRID_CELL), 1e-12))


def train_ours(dataset, seed, budget, arguments):
    """Train our recipe within the budget; see ``train_peer``."""
    import keras  # here, so that the processes of the peers are theirs alone
    import tensorflow as tf

    import train_models

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    ends = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(process_time()))
    start = process_time()
    train_models.train_egm(dataset, seed, epochs=6, callbacks=[clock])
    later_epochs = round((budget - (ends[0] - start)) / ((ends[5] - ends[0]) / 5))  # the first builds, too
    start = process_time()
    model = train_models.train_egm(dataset, seed, 1 + max(0, later_epochs))
    numbers = {"training_seconds": process_time() - start, "steps": model.num_steps}
    log_density = partial(model.dde_real.log_density, noise_std=NOISE_STD)
    corrected = partial(model.sample, seed=seed, corrected=True)  # the generator, two log densities, two scores
    samplers = {"": (1, partial(model.sample, seed=seed)), "-corrected": (5, corrected)}
    return samplers, log_density, numbers


def run(method, dataset, seed, budget, arguments):
    """Train and measure once; write a row for each sampler to the csv file."""
    train = train_ours if method == "ours" else partial(train_peer, method)
    samplers, log_density, numbers = train(dataset, seed, budget, arguments)
    density = (math.nan, math.nan)
    if log_density:
        density = evaluation.density_metrics(log_density, partial(noisy_density_2d, dataset, noise_std=NOISE_STD))
    key = {"run": method, "dataset": dataset, "seed": seed, "budget": budget}
    numbers["samples"] = arguments.samples
    rows = []
    for name, (evaluations, sample) in samplers.items():
        sample(1000)  # the first call is slower
        start = process_time()
        samples = sample(arguments.samples)
        numbers["sampling_seconds"] = (process_time() - start) * 1_000_000 / arguments.samples
        row = {**key, "method": method + name, "evaluations": evaluations, **numbers}
        row.update(measure(dataset, samples, seed), density_tv=density[0], density_kl=density[1])
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    report.replace_run(arguments.folder / "peers.csv", key, rows)


def plot(rows, methods, path):
    """Draw the excess of the total variation over its floor against time; the two add as lengths at right angles do."""
    figure = Figure((13, 4.2), layout="constrained")
    for ax, dataset in zip(figure.subplots(1, len(DATASETS), sharey=True), DATASETS, strict=True):
        for index, method in enumerate(methods):
            its = np.sort(rows[(rows["dataset"] == dataset) & (rows["method"] == method)], order="budget")
            excess = np.sqrt(np.maximum(its["tv"] ** 2 - its["tv_floor"] ** 2, 1e-6))
            for seed in np.unique(its["seed"]):
                one = its["seed"] == seed
                ax.loglog(its["training_seconds"][one], excess[one], f"C{index}.-")
            ax.plot([], [], f"C{index}.-", label=method)
        ax.set(title=dataset, xlabel="CPU seconds of training")
        ax.set_xticks(np.unique(rows["budget"]), [f"{budget:.0f}" for budget in np.unique(rows["budget"])])
        ax.xaxis.set_minor_locator(NullLocator())
    figure.axes[0].set_ylabel("sqrt(TV^2 - floor^2)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=80)


def write_results(arguments):
    """Write the picture of the rows in the csv file, and tables of those with the largest budget."""
    rows = np.genfromtxt(arguments.folder / "peers.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    methods = [name for run in METHODS for name in dict.fromkeys(rows["method"][rows["run"] == run].tolist())]
    plot(rows, methods, arguments.folder / "peers.png")
    rows = rows[rows["budget"] == rows["budget"].max()]
    text = "![excess of total variation against training time](peers.png)\n"
    for dataset in (dataset for dataset in DATASETS if dataset in rows["dataset"]):
        by_method = ((method, rows[(rows["dataset"] == dataset) & (rows["method"] == method)]) for method in methods)
        table = [
            (method, *(report.describe_spread(its[name]) for name in COLUMNS)) for method, its in by_method if len(its)
        ]
        titles = (name.replace("_", " ").replace("tv", "TV").replace("kl", "KL") for name in COLUMNS)
        text += f"\n{report.make_table([f'`{dataset}`', *titles], table)}\n"
    seeds_of = ((run, np.unique(rows["seed"][rows["run"] == run])) for run in METHODS)
    seeds = "; ".join(f"{run} {', '.join(map(str, its))}" for run, its in seeds_of if len(its))
    counts = " or ".join(f"{count:,}" for count in np.unique(rows["samples"]))
    runs = f"Seeds: {seeds}; {rows['budget'][0]:.0f} CPU seconds of training; {counts} generated points. "
    path = arguments.folder / "README.md"
    packages = ["tensorflow", "torch", "zuko", "flow_matching"]
    runs += report.find_run_line("peers", packages, arguments.tables_only, path)
    text += (
        f"\nSampling of a million points; evaluations of a network for each point; means (smallest to largest). {runs}"
    )
    report.write_section("peers", text, path)
    write_summary(rows, methods, path)


def write_summary(rows, methods, path):
    """Write the smallest and the largest numbers of each method, over data sets and seeds."""
    names = {"tv": "TV", "kl": "KL (nats)", "sliced_w1_ratio": "W1 / floor", "density_tv": "Density: TV"}
    names["sampling_seconds"] = "Sampling a million (CPU s)"

    def describe(values):
        low, high = (f"{value:.0f}" if value >= 100 else f"{value:#.2g}" for value in (values.min(), values.max()))
        return "" if np.isnan(values).any() else f"{low.rstrip('.')} to {high.rstrip('.')}"

    by_method = {method: rows[rows["method"] == method] for method in methods if method in rows["method"]}
    table = [(f"`{method}`", *(describe(its[name]) for name in names)) for method, its in by_method.items()]
    table.append(("real points (floor)", *(describe(rows[f"{name}_floor"]) for name in ("tv", "kl")), "1", "", ""))
    text = f"{report.make_table(['', *names.values()], table)}\n\nSmallest to largest over data sets and seeds."
    report.write_section("peers summary", text, path)


def main():
    """Run, and write the section of README.md and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budgets", nargs="+", type=float, default=[30.0, 60.0, 120.0], help="CPU seconds of training")
    parser.add_argument("--learning-rate", type=float, help="of the peers, instead of each one's own: to search it")
    parser.add_argument("--samples", type=int, default=500_000, help="for the measurements")
    parser.add_argument("--folder", type=Path, default=report.FOLDER, help="of README.md, csv and picture")
    parser.add_argument("--tables-only", action="store_true", help="of the runs in peers.csv")
    arguments = parser.parse_args()
    failures, runs = [], itertools.product(arguments.methods, arguments.datasets, arguments.seeds, arguments.budgets)
    for call in () if arguments.tables_only else runs:
        process = multiprocessing.get_context("spawn").Process(target=run, args=(*call, arguments))
        process.start()
        process.join()
        failures += [call] if process.exitcode else []
    write_results(arguments)
    if failures:
        sys.exit(f"these runs failed: {failures}")


if __name__ == "__main__":
    main()
