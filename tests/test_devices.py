"""Several devices give the result of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def results():
    program = Path(__file__).with_name("two_devices.py")
    process = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["DDE 0.3", "DDE (0.2, 1.5)", "EGM 0.3", "EGM (0.2, 1.5)"])
def test_two_devices_take_the_steps_of_one(case, results):
    assert results[case]["moved"] > 0.01
    for name in ("weights", "losses", "evaluations"):
        assert results[case][name] < 1e-5, results


def test_each_device_draws_noise_of_its_own(results):
    assert results["noise"]["whole"] == 0.0
    assert results["noise"]["smallest difference"] > 0.0


def test_training_on_two_devices_is_restored_exactly(results):
    assert results["resumed"]["epochs"] == [2]
    assert results["resumed"]["weights"] < 1e-5
    assert results["resumed"]["file"] == 0.0


def test_what_fails_on_several_devices_is_refused(results):
    jit, several_steps, not_finite = results["refused"]["messages"]
    assert "jit_compile must be False and steps_per_execution 1, got True and 1" in jit
    assert "got False and 2" in several_steps
    assert "the batch of data is not finite: training has stopped at step 2" in not_finite
    assert results["refused"]["finite"]
