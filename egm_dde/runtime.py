"""What the process needs before TensorFlow starts."""

import contextlib
import ctypes
import os
import sys

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def prepare_process():
    """Make small networks fast on a CPU, and TensorFlow quiet. Call it before TensorFlow is imported.

    * The memory allocator keeps what it frees. glibc returns the temporaries of each step to the system and asks for
      them again in the next: 400 to 800 page faults a step of the tutorial's model, and 1 with this. The results stay
      the same to the last bit.
    * Operations run on one thread each (``TF_NUM_INTRAOP_THREADS=1``): with small matrices, cores do better to share
      out whole operations.
    * TensorFlow's start-up notes stay off the notebook: its log level is 2, and in Jupyter what C++ writes to standard
      error goes to Jupyter's terminal.

    Keras is told to use TensorFlow. Environment variables that are set already win. Without glibc, the allocator stays.
    """
    require_tensorflow()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    with contextlib.suppress(OSError, AttributeError, ValueError):  # raised where standard error is no file
        if sys.stderr.fileno() != 2:
            os.dup2(sys.stderr.fileno(), 2)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def require_tensorflow():
    """Let Keras compute with TensorFlow, or raise ImportError if another backend has been chosen for it."""
    keras = sys.modules.get("keras")
    chosen = keras.config.backend() if keras else os.environ.get("KERAS_BACKEND")
    if chosen and chosen != "tensorflow":
        raise ImportError(f"this needs KERAS_BACKEND=tensorflow, set before Keras is imported; it is {chosen!r}")
    os.environ["KERAS_BACKEND"] = "tensorflow"
