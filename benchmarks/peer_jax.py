"""The training step of an EGM with two steps of each DDE, written the usual way in JAX: pure functions, one jit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax


def dense_layers(hidden, layers, activation):
    """Apply dense layers, the last one without activation."""
    for kernel, *bias in layers[:-1]:
        hidden = activation(hidden @ kernel + bias[0])
    kernel, *bias = layers[-1]
    return hidden @ kernel + (bias[0] if bias else 0.0)


def energy_net(layers, frequencies, data_std, x, log_noise_std):
    """Log density (batch, 1): damped Fourier features, dense tanh layers, Gaussian base measure."""
    phases = x @ frequencies
    damping = jnp.exp(-0.5 * jnp.exp(2 * log_noise_std) * jnp.square(frequencies).sum(0))
    features = jnp.concatenate([x, damping * jnp.sin(phases), damping * jnp.cos(phases), log_noise_std], -1)
    variance = data_std**2 + jnp.exp(2 * log_noise_std)
    base = -0.5 * (jnp.square(x).sum(-1, keepdims=True) / variance + x.shape[-1] * jnp.log(2 * jnp.pi * variance))
    return dense_layers(features, layers, jnp.tanh) + base


def generate(layers, frequencies, data_std, z):
    """Map latents to points: data_std * z plus a dense correction of its Fourier features."""
    phases = z @ frequencies
    features = jnp.concatenate([z, jnp.sin(phases), jnp.cos(phases)], -1)
    return data_std * z + dense_layers(features, layers, jax.nn.relu)


def average_over_sources(x, noisy_x, noise_std):
    """Average the noise (batch, 2) and its squared norm (batch, 1) over the points it may have been added to."""
    squared_x, squared_y = jnp.square(x).sum(-1), jnp.square(noisy_x).sum(-1, keepdims=True)
    weights = jax.nn.softmax((noisy_x @ x.T - 0.5 * squared_x) / jnp.square(noise_std))  # (batch, batch)
    mean_x = weights @ x
    mean_squared_distance = squared_y - 2 * (noisy_x * mean_x).sum(-1, keepdims=True) + weights @ squared_x[:, None]
    return (noisy_x - mean_x) / noise_std, mean_squared_distance / jnp.square(noise_std)


def expected_square(estimate, target, mean_target):
    """Square the error, where the estimate meets the mean of the targets."""
    return jnp.square(estimate - mean_target) + jnp.square(target) - jnp.square(mean_target)


def denoising_loss(layers, net, x, log_noise_std, noise):
    """Return the loss of dual score matching."""
    noise_std = jnp.exp(log_noise_std)
    noisy_x = x + noise_std * noise
    total = lambda noisy_x, level: net(layers, noisy_x, level).sum()  # noqa: E731
    score, level_derivative = jax.grad(total, argnums=(0, 1))(noisy_x, log_noise_std)
    mean_noise, mean_squared_norm = average_over_sources(x, noisy_x, noise_std)
    dim = x.shape[-1]
    squared_norm = jnp.square(noise).sum(-1, keepdims=True)
    dual = expected_square(level_derivative, squared_norm - dim, mean_squared_norm - dim)
    return expected_square(noise_std * score, -noise, -mean_noise).mean() + dual.mean() / (2 * dim)


def generator_loss(layers, generator, log_real, log_fake, z, log_noise_std, noise):
    """Return the KL divergence up to a constant."""
    noisy_y = generator(layers, z) + jnp.exp(log_noise_std) * noise
    return jnp.mean(log_fake(noisy_y, log_noise_std) - log_real(noisy_y, log_noise_std))


def draw_noise(key, batch_size, noise_range):
    """Draw stratified log noise levels (batch, 1) and standard normal noise (batch, 2)."""
    noise_key, level_key = jax.random.split(key)
    low, high = np.log(noise_range)
    fractions = (jnp.arange(batch_size) + jax.random.uniform(level_key)) / batch_size
    return (low + (high - low) * fractions)[:, None], jax.random.normal(noise_key, (batch_size, 2))


def prepare(problem):
    """Return ``run(num_steps)`` and ``losses`` of this framework."""
    (real_frequencies, real), (fake_frequencies, fake), (gen_frequencies, gen) = jax.tree.map(
        jnp.asarray, (problem.net_real, problem.net_fake, problem.generator)
    )

    def net_real(layers, x, log_noise_std):
        return energy_net(layers, real_frequencies, problem.data_std, x, log_noise_std)

    def net_fake(layers, x, log_noise_std):
        return energy_net(layers, fake_frequencies, problem.data_std, x, log_noise_std)

    def generator(layers, z):
        return generate(layers, gen_frequencies, problem.data_std, z)

    def adam(learning_rate, num_steps):
        return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps), b1=0.5, eps=1e-7)

    dde_optimizer = adam(5e-3, problem.dde_steps * problem.num_steps)
    gen_optimizer = adam(3e-3, problem.num_steps)

    def descend(optimizer, loss, layers, slots):
        updates, slots = optimizer.update(jax.grad(loss)(layers), slots)
        return optax.apply_updates(layers, updates), slots

    @partial(jax.jit, donate_argnums=0)
    def step(state, x):
        batch_size = len(x)
        num_latents = problem.latents_per_point * batch_size
        state = dict(state)

        def draw_key():
            state["key"], key = jax.random.split(state["key"])
            return key

        z = jax.random.normal(draw_key(), (num_latents, 2))
        noise = draw_noise(draw_key(), num_latents, problem.noise_std)
        log_real, log_fake = partial(net_real, state["real"]), partial(net_fake, state["fake"])
        loss = lambda layers: generator_loss(layers, generator, log_real, log_fake, z, *noise)  # noqa: E731
        state["gen"], state["gen_slots"] = descend(gen_optimizer, loss, state["gen"], state["gen_slots"])
        state["average"] = optax.incremental_update(state["gen"], state["average"], 1 - problem.average_decay)
        for _ in range(problem.dde_steps):
            y = generator(state["gen"], jax.random.normal(draw_key(), (batch_size, 2)))
            for name, net, points in (("real", net_real, x), ("fake", net_fake, y)):
                noise = draw_noise(draw_key(), batch_size, problem.noise_std)
                state[name], state[f"{name}_slots"] = descend(
                    dde_optimizer,
                    lambda layers, net=net, points=points, noise=noise: denoising_loss(layers, net, points, *noise),
                    state[name],
                    state[f"{name}_slots"],
                )
        return state

    state = {
        **{"real": real, "fake": fake, "gen": gen, "average": jax.tree.map(jnp.copy, gen)},
        **{"real_slots": dde_optimizer.init(real), "fake_slots": dde_optimizer.init(fake)},
        **{"gen_slots": gen_optimizer.init(gen), "key": jax.random.key(0)},
    }
    batches = jnp.asarray(problem.batches)

    def losses(x, z, log_noise_std, noise):
        log_real, log_fake = partial(net_real, state["real"]), partial(net_fake, state["fake"])
        return (
            float(denoising_loss(state["real"], net_real, x, log_noise_std, noise)),
            float(generator_loss(state["gen"], generator, log_real, log_fake, z, log_noise_std, noise)),
        )

    def run(num_steps):
        nonlocal state
        for index in range(num_steps):
            state = step(state, batches[index % len(batches)])
        jax.block_until_ready(state)

    return run, losses
