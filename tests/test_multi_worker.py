"""Two processes on this machine train together, whatever happens to one of them."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

import multi_worker
from energy_models import DDE, EGM, build_energy_net, build_generator
from utils import sample_2d_data

ROOT = Path(__file__).parent.parent
SEED, BATCH_SIZE, EVERY = 3, 128, 20

# Small networks are built faster. Momentum has to be restored, as Adam's has.
SMALL = f"""
import sys
sys.path[:0] = ["{ROOT}", "{ROOT / "examples"}", "{ROOT / "tests"}"]
import multi_worker, test_multi_worker
multi_worker.build_egm = test_multi_worker.build_small_egm
multi_worker.main()
"""


def build_small_egm(seed, epochs):
    def build_dde(seed):
        net = build_energy_net(noise_conditional=True, widths=(8,), num_features=8, seed=seed)
        return DDE(net, (0.1, 1.5), seed=seed)

    generator = build_generator(widths=(8,), num_features=8, seed=seed)
    egm = EGM(build_dde(seed), build_dde(seed + 1), generator, dde_steps=1, seed=seed)
    egm.compile(keras.optimizers.SGD(0.01, momentum=0.9), keras.optimizers.SGD(0.01, momentum=0.9))
    return egm


def free_addresses(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    addresses = [f"127.0.0.1:{free.getsockname()[1]}" for free in sockets]
    for free in sockets:
        free.close()
    return addresses


def start(addresses, folder, steps):
    """Start all workers."""
    options = {"checkpoint": folder, "steps": steps, "every": EVERY, "batch-size": BATCH_SIZE, "seed": SEED}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [
        subprocess.Popen(
            [sys.executable, "-c", SMALL, "--workers", *addresses, f"--index={index}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(len(addresses))
    ]


def kill(workers):
    for worker in workers:
        worker.kill()
        worker.communicate()


def run(folder, steps):
    """Run two workers to their end; return what they printed."""
    workers = start(free_addresses(2), folder, steps)
    try:
        outputs = [worker.communicate(timeout=500) for worker in workers]
    finally:
        kill(workers)
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run whose worker 1 is killed after the first checkpoint, and how worker 0 ended."""
    folder = tmp_path_factory.mktemp("interrupted")
    addresses = free_addresses(2)
    workers = start(addresses, folder, 1_000_000)
    try:
        end = time.monotonic() + 500
        while not multi_worker.find_checkpoint(folder):
            assert time.monotonic() < end and workers[0].poll() is None
            time.sleep(0.02)
        workers[1].send_signal(signal.SIGKILL)
        _, errors = workers[0].communicate(timeout=40)  # it ends by itself
    finally:
        kill(workers)
    ended = SimpleNamespace(folder=folder, lost=addresses[1], status=workers[0].returncode, errors=errors)
    ended.checkpoint = multi_worker.find_checkpoint(folder)
    ended.step = EGM.load(ended.checkpoint).num_steps
    return ended


@pytest.fixture(scope="module")
def uninterrupted(interrupted, tmp_path_factory):
    """A run three steps longer than that, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    steps = interrupted.step + 3
    return SimpleNamespace(steps=steps, outputs=run(folder, steps), egm=EGM.load(multi_worker.find_checkpoint(folder)))


def digest(output):
    return re.search(r"worker \d has weights (\w{64})\n", output)[1]


@pytest.mark.slow
def test_who_loses_a_worker_ends_and_names_it_and_the_checkpoint(interrupted):
    assert interrupted.status == 1
    assert f"worker 0: lost worker 1 ({interrupted.lost})" in interrupted.errors
    assert f"from {interrupted.checkpoint}, step {interrupted.step}\n" in interrupted.errors
    assert "Traceback" not in interrupted.errors


@pytest.mark.slow
def test_two_workers_go_where_one_process_goes(uninterrupted):
    assert uninterrupted.egm.num_steps == uninterrupted.steps
    rngs = (np.random.default_rng((SEED, step)) for step in range(uninterrupted.steps))
    batches = np.stack([sample_2d_data("rings", BATCH_SIZE, rng) for rng in rngs])
    egm = build_small_egm(SEED, None)
    start = flat_weights(egm)
    egm.fit(tf.data.Dataset.from_tensor_slices(batches), verbose=0)
    distance = np.linalg.norm(flat_weights(egm) - start)
    assert distance > 0.1
    assert np.linalg.norm(flat_weights(uninterrupted.egm) - flat_weights(egm)) < 0.3 * distance  # their noise differs


def flat_weights(model):
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


@pytest.mark.slow
def test_all_workers_have_the_same_weights_and_one_reports(uninterrupted):
    (first, second), steps = uninterrupted.outputs, uninterrupted.steps
    assert digest(first) == digest(second)
    reported = [int(step) for step in re.findall(r"step (\d+): loss_dde_real", first)]
    assert reported == [*range(EVERY, steps, EVERY), steps]
    assert "step" not in second


@pytest.mark.slow
def test_restarted_workers_go_on_as_if_nothing_had_happened(interrupted, uninterrupted):
    outputs = run(interrupted.folder, uninterrupted.steps)
    assert re.findall(r"step (\d+):", outputs[0]) == [str(uninterrupted.steps)]  # only what was left to do
    assert digest(outputs[0]) == digest(outputs[1]) == digest(uninterrupted.outputs[0])
    assert [path.name for path in interrupted.folder.iterdir()] == [f"step_{uninterrupted.steps:08d}.keras"]


# ---------------------------------------------------------------------------------------------- before the start


def test_workers_that_differ_are_refused():
    for difference in (0, 1):
        strategy = SimpleNamespace(gather=lambda number, axis, d=difference: tf.concat([number, number + d], axis))
        refused = pytest.raises(ValueError, match="the workers have different arguments")
        with refused if difference else contextlib.nullcontext():
            multi_worker.check_equal(strategy, "settings", "arguments")


def test_a_worker_that_does_not_come_is_named():
    own, there, missing = free_addresses(3)
    arguments = SimpleNamespace(workers=[own, there, missing], index=0, wait=0.5)
    with socket.create_server(("127.0.0.1", int(there.split(":")[1]))):
        with pytest.raises(TimeoutError, match=re.escape(f"worker 2 ({missing}) did not come in 0.5 s")) as error:
            multi_worker.wait_for_others(arguments)
        assert "worker 1" not in str(error.value)
        with socket.create_server(("127.0.0.1", int(missing.split(":")[1]))):
            multi_worker.wait_for_others(arguments)


def parse(monkeypatch, arguments, environment=None):
    monkeypatch.setattr(sys, "argv", ["multi_worker.py", "--checkpoint", "folder", *arguments.split()])
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if environment is not None:
        monkeypatch.setenv("TF_CONFIG", environment)
    return multi_worker.parse_arguments()


def test_workers_come_from_arguments_or_from_the_environment(monkeypatch):
    config = '{"cluster": {"worker": ["host0:1", "host1:2"]}, "task": {"type": "worker", "index": 1}}'
    for given in (parse(monkeypatch, "--workers host0:1 host1:2 --index 1"), parse(monkeypatch, "", config)):
        assert (given.workers, given.index) == (["host0:1", "host1:2"], 1)


CHIEF = '{"cluster": {"chief": ["host0:1"], "worker": ["host1:1"]}, "task": {"index": 0}}'


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ("", None, "give --workers and --index, or TF_CONFIG"),
        ("", "{", "give --workers and --index, or TF_CONFIG"),
        ("", CHIEF, "chief are no workers"),
        ("--workers host0:1 host1:1", None, "--index must be from 0 to 1, got None"),
        ("--workers host0:1 host1:1 --index 2", None, "--index must be from 0 to 1, got 2"),
        ("--workers host0:1 host0:1 --index 0", None, "different addresses HOST:PORT, got 'host0:1'"),
        ("--workers host0:1 host1 --index 0", None, "different addresses HOST:PORT, got 'host1'"),
        ("--workers host0:1 --index 0 --steps 0", None, "--steps, --every and --batch-size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, environment, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, arguments, environment)
    assert message in capsys.readouterr().err
