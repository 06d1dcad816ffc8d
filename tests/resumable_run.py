"""Train a small model with a backup after each epoch, killed on the way: the program that a test starts again."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np

from energy_models import DDE, EGM, build_energy_net, build_generator

EPOCHS = 6


def train(callbacks=()):
    """Return the history and the final state, optimizers included, of one run with the callbacks given."""
    ddes = [DDE(build_energy_net(2, True, (8,), num_features=4, seed=seed), (0.1, 1.5), seed=seed) for seed in (1, 2)]
    model = EGM(*ddes, build_generator(widths=(8,), num_features=4, seed=3), dde_steps=2, seed=4)
    model.compile()
    x = np.random.default_rng(0).standard_normal((101, 2))
    history = model.fit(x, batch_size=10, epochs=EPOCHS, verbose=0, callbacks=[*callbacks])
    variables = [*model.weights, *(variable for each in (model, *ddes) for variable in each.optimizer.variables)]
    return history, [keras.ops.convert_to_numpy(variable) for variable in variables]


class KillWithin(keras.callbacks.Callback):
    """Kills the process after the 14th batch, in the second epoch."""

    num_batches = 14

    def on_train_batch_end(self, batch, logs=None):
        self.num_batches -= 1
        if self.num_batches == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class KillWhileSaving(keras.callbacks.Callback):
    """Kills the process when it has written half of the second backup."""

    def on_epoch_end(self, epoch, logs=None):
        def write_half(path, data):
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        if epoch > 0:
            Path.write_bytes = write_half


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    kill = {"within an epoch": [KillWithin()], "while saving": [KillWhileSaving()], "not": []}[how]
    history, state = train([*kill, keras.callbacks.BackupAndRestore(folder / "backup")])
    np.savez(folder / "result.npz", *state, epochs=history.epoch, **history.history)
