"""Settings that have to be in place before the first test module is imported."""

import os

from egm_dde.runtime import prepare_process

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
prepare_process()

import hypothesis
import matplotlib

# Not through MPLBACKEND: the kernels that tests start would inherit it and draw no inline figures.
matplotlib.use("agg")

# A test must not fail because the machine was busy, nor only on some runs.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
