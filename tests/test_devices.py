"""Several devices take the mean of their steps, with noise of their own, and can be interrupted as one can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments):
    program = Path(__file__).with_name("two_devices.py")
    process = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(process.stdout.splitlines()[-1])


STEPS = ["DDE", "DDE of one level", "EGM", "dde_fake"]


@pytest.fixture(scope="module")
def results():
    return run(*STEPS, "replicas", "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_the_mean_of_those_that_each_device_would_take(case, results):
    assert results[case]["moved"] > 1e-3
    assert results[case]["replicas"] > 1e-4  # each has points and noise of its own
    assert results[case]["weights"] < 1e-6
    assert results[case]["losses"] < 1e-5


@pytest.mark.slow
def test_weights_stay_equal_and_incomplete_batches_are_left_out(results):
    assert results["replicas"]["moved"] > 0.01
    assert results["replicas"]["difference"] == 0.0
    assert results["replicas"]["steps"] == 3 * 4  # of 203 points in batches of 50
    assert results["replicas"]["evaluation"]


@pytest.mark.slow
def test_training_on_two_devices_is_restored_exactly(results):
    assert results["resumed"] == {"epochs": [2], "weights": 0.0, "file": 0.0}


def test_what_fails_on_several_devices_is_refused():
    refused = run("refused")["refused"]
    jit, several_steps, odd, too_large, not_finite = refused["messages"]
    assert "jit_compile must be False and steps_per_execution 1, got True and 1" in jit
    assert "got False and 2" in several_steps
    assert "on 2 devices, batch_size must be a multiple of 2 and at most the number of points, 203; got 51" in odd
    assert "got 204" in too_large
    assert not_finite.startswith("the batch of points is not finite: training has stopped at step 2")
    assert refused["finite"]
