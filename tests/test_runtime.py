"""What is set before TensorFlow starts."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from egm_dde import runtime

ROOT = Path(__file__).parent.parent
NAMES = ("TF_CPP_MIN_LOG_LEVEL", "TF_NUM_INTRAOP_THREADS")


@pytest.mark.parametrize("given", [None, "0"])
def test_settings_of_the_environment_win(monkeypatch, given):
    for name in NAMES:
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
    runtime.prepare_process()
    assert [os.environ[name] for name in NAMES] == ([given, given] if given else ["2", "1"])


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_other_c_libraries_are_left_alone(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", fail)
    runtime.prepare_process()


CODE = """
from egm_dde.runtime import prepare_process
prepare_process()
import resource
import numpy as np
import tensorflow as tf
from energy_models import DDE, build_energy_net

def num_faults(num_blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [np.ones(1 << 19) for _ in range(num_blocks)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

dde = DDE(build_energy_net())
dde.compile()
dde.fit(DATA, verbose=0)
num_faults(30)
print(num_faults(30))
"""
DATA = {"array": "np.zeros((8, 2))", "dataset": "tf.data.Dataset.from_tensors(tf.zeros([8, 2]))"}


def count_faults(code):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
@pytest.mark.parametrize("data", DATA)
def test_the_allocator_keeps_what_is_freed_after_training(data):
    assert count_faults(CODE.replace("DATA", DATA[data])) < 1000  # 300 times 1024, where it does not
