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

def print_faults(num_blocks):
    for _ in range(2):  # the first one brings the memory
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            [np.ones(1 << 19) for _ in range(num_blocks)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

print_faults(10)
dde = DDE(build_energy_net())
dde.compile()
x = tf.zeros([8, 2])
dde.fit(x.numpy(), verbose=0)
print_faults(20)  # more than was kept before
dde.fit(tf.data.Dataset.from_tensors(x), verbose=0)
print_faults(30)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_the_allocator_keeps_what_it_frees_and_training_leaves_it_so():
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    process = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    faults = [int(number) for number in process.stdout.split()]
    assert len(faults) == 3
    assert max(faults) < 2000, faults  # 100 times 1024 pages of 4 KiB and more, where it does not
