"""The training step of an EGM with two steps of each DDE, written the usual way in PyTorch."""

import math
from functools import partial

import numpy as np
import torch
from torch import nn


class FourierNet(nn.Module):
    """Dense layers on random Fourier features, from a Keras network's arrays."""

    def __init__(self, frequencies, layers, data_std):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor(frequencies))
        self.layers = nn.ModuleList(make_linear(*layer) for layer in layers)
        self.data_std = data_std


class EnergyNet(FourierNet):
    """Log density f(x, log noise_std): damped Fourier features, dense tanh layers, Gaussian base measure."""

    def forward(self, x, log_noise_std):
        phases = x @ self.frequencies  # (batch, num_features)
        damping = torch.exp(-0.5 * torch.exp(2 * log_noise_std) * self.frequencies.square().sum(0))
        hidden = torch.cat([x, damping * torch.sin(phases), damping * torch.cos(phases), log_noise_std], dim=-1)
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        variance = self.data_std**2 + torch.exp(2 * log_noise_std)
        squared_norm = x.square().sum(-1, keepdim=True)
        base = -0.5 * (squared_norm / variance + x.shape[-1] * torch.log(2 * math.pi * variance))
        return self.layers[-1](hidden) + base  # (batch, 1)


class Generator(FourierNet):
    """Map latents to points: data_std * z plus a dense correction of its Fourier features."""

    def forward(self, z):
        phases = z @ self.frequencies
        hidden = torch.cat([z, torch.sin(phases), torch.cos(phases)], dim=-1)
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        return self.data_std * z + self.layers[-1](hidden)


def make_linear(kernel, bias=None):
    """Make a linear layer from a Keras kernel (inputs, outputs)."""
    linear = nn.Linear(*kernel.shape, bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(kernel.T))
        if bias is not None:
            linear.bias.copy_(torch.tensor(bias))
    return linear


def average_over_sources(x, noisy_x, noise_std):
    """Average the noise (batch, 2) and its squared norm (batch, 1) over the points it may have been added to."""
    squared_x, squared_y = x.square().sum(-1), noisy_x.square().sum(-1, keepdim=True)
    weights = torch.softmax((noisy_x @ x.T - 0.5 * squared_x) / noise_std.square(), dim=-1)  # (batch, batch)
    mean_x = weights @ x
    mean_squared_distance = squared_y - 2 * (noisy_x * mean_x).sum(-1, keepdim=True) + weights @ squared_x[:, None]
    return (noisy_x - mean_x) / noise_std, mean_squared_distance / noise_std.square()


def expected_square(estimate, target, mean_target):
    """Square the error, where the estimate meets the mean of the targets."""
    return (estimate - mean_target).square() + target.square() - mean_target.square()


def differentiate(net, noisy_x, log_noise_std):
    """Return the derivatives of the log density, the usual way."""
    noisy_x, log_noise_std = noisy_x.requires_grad_(), log_noise_std.requires_grad_()
    return torch.autograd.grad(net(noisy_x, log_noise_std).sum(), (noisy_x, log_noise_std), create_graph=True)


def differentiate_functionally(net, noisy_x, log_noise_std):
    """Return the derivatives of the log density in the way that torch.compile can differentiate once more."""
    return torch.func.grad(lambda *inputs: net(*inputs).sum(), argnums=(0, 1))(noisy_x, log_noise_std)


def denoising_loss(differentiate, net, x, log_noise_std, noise):
    """Return the loss of dual score matching."""
    noise_std = torch.exp(log_noise_std)
    noisy_x = x + noise_std * noise
    score, level_derivative = differentiate(net, noisy_x, log_noise_std)
    with torch.no_grad():
        mean_noise, mean_squared_norm = average_over_sources(x, noisy_x, noise_std)
    dim = x.shape[-1]
    squared_norm = noise.square().sum(-1, keepdim=True)
    dual = expected_square(level_derivative, squared_norm - dim, mean_squared_norm - dim)
    return expected_square(noise_std * score, -noise, -mean_noise).mean() + dual.mean() / (2 * dim)


def generator_loss(net_real, net_fake, generator, z, log_noise_std, noise):
    """Return the KL divergence up to a constant."""
    noisy_y = generator(z) + torch.exp(log_noise_std) * noise
    return (net_fake(noisy_y, log_noise_std) - net_real(noisy_y, log_noise_std)).mean()


class Trainer:
    """Networks, optimizers and the training step.

    Args:
        problem: ``step_time.Problem``: the networks' weights and the settings.
        compiled: whether the losses go through ``torch.compile``.
    """

    def __init__(self, problem, compiled):
        self.problem = problem
        self.net_real = EnergyNet(*problem.net_real, problem.data_std)
        self.net_fake = EnergyNet(*problem.net_fake, problem.data_std)
        self.generator = Generator(*problem.generator, problem.data_std)
        self.average_generator = Generator(*problem.generator, problem.data_std)
        self.denoising_loss = partial(denoising_loss, differentiate)
        self.generator_loss = generator_loss
        if compiled:
            self.denoising_loss = torch.compile(partial(denoising_loss, differentiate_functionally))
            self.generator_loss = torch.compile(generator_loss)
        num_steps = problem.num_steps
        self.optimizers = []
        for network, learning_rate, steps in (
            (self.net_real, 5e-3, problem.dde_steps * num_steps),
            (self.net_fake, 5e-3, problem.dde_steps * num_steps),
            (self.generator, 3e-3, num_steps),
        ):
            optimizer = torch.optim.Adam(network.parameters(), learning_rate, betas=(0.5, 0.999), eps=1e-7)
            self.optimizers.append((optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)))

    def draw_noise(self, batch_size):
        """Draw stratified log noise levels (batch, 1) and standard normal noise (batch, 2)."""
        low, high = np.log(self.problem.noise_std)
        fractions = (torch.arange(batch_size, dtype=torch.float32) + torch.rand(())) / batch_size
        return (low + (high - low) * fractions)[:, None], torch.randn(batch_size, 2)

    def step(self, x):
        """Take one training step on points (batch, 2)."""
        batch_size = len(x)
        real, fake, gen = self.optimizers
        num_latents = self.problem.latents_per_point * batch_size
        for net in (self.net_real, self.net_fake):
            net.requires_grad_(False)
        z = torch.randn(num_latents, 2)
        loss = self.generator_loss(self.net_real, self.net_fake, self.generator, z, *self.draw_noise(num_latents))
        self.descend(gen, loss)
        for net in (self.net_real, self.net_fake):
            net.requires_grad_(True)
        with torch.no_grad():
            averages = list(self.average_generator.parameters())
            torch._foreach_lerp_(averages, list(self.generator.parameters()), 1 - self.problem.average_decay)
        for _ in range(self.problem.dde_steps):
            self.descend(real, self.denoising_loss(self.net_real, x, *self.draw_noise(batch_size)))
            with torch.no_grad():
                y = self.generator(torch.randn(batch_size, 2))
            self.descend(fake, self.denoising_loss(self.net_fake, y, *self.draw_noise(batch_size)))

    def descend(self, optimizer_and_schedule, loss):
        """Take one optimizer step."""
        optimizer, schedule = optimizer_and_schedule
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    def losses(self, x, z, log_noise_std, noise):
        """Return both losses on given draws, to compare with those of the other frameworks."""
        x, z, log_noise_std, noise = map(torch.tensor, (x, z, log_noise_std, noise))
        return (
            self.denoising_loss(self.net_real, x, log_noise_std, noise).item(),
            self.generator_loss(self.net_real, self.net_fake, self.generator, z, log_noise_std, noise).item(),
        )


def prepare(problem, compiled=False):
    """Return ``run(num_steps)`` and ``losses`` of this framework."""
    torch.manual_seed(0)
    trainer = Trainer(problem, compiled)
    batches = torch.tensor(problem.batches)

    def run(num_steps):
        for index in range(num_steps):
            trainer.step(batches[index % len(batches)])

    return run, trainer.losses
