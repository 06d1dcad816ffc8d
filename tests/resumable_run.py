"""Train a small model with a backup after each epoch: the program that a test kills and starts again."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np

from energy_models import DDE, EGM, build_energy_net, build_generator
from utils import sample_2d_data

EPOCHS = 40


def train(kind, callbacks):
    """Return the history and the final state, optimizers included, of one run with the callbacks given."""
    ddes = [DDE(build_energy_net(2, True, (16,), num_features=8, seed=seed), (0.1, 1.5), seed=seed) for seed in (1, 2)]
    if kind == "DDE":
        model = ddes[0]
        optimizers = ["optimizer"]
    else:
        model = EGM(*ddes, build_generator(widths=(16,), num_features=8, seed=3), dde_steps=2, seed=4)
        optimizers = ["dde_real_optimizer", "dde_fake_optimizer", "gen_optimizer"]
    model.compile()
    x = sample_2d_data("2spirals", 6_001, rng=0)
    history = model.fit(x, batch_size=100, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    variables = [*model.weights, *(variable for name in optimizers for variable in getattr(model, name).variables)]
    return history, [keras.ops.convert_to_numpy(variable) for variable in variables]


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    history, state = train(kind, [keras.callbacks.BackupAndRestore(folder / "backup")])
    np.savez(folder / "result.npz", *state, epochs=history.epoch, **history.history)
