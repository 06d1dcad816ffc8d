"""Train the generative model on several machines, which share out every batch and average their gradients.

Start it on each of them, with addresses that all of them reach and a folder that all of them see:

    python examples/multi_worker.py --workers host0:2222 host1:2222 --index 0 --checkpoint FOLDER

and --index 1 on the second one; TF_CONFIG will do instead of the first two arguments. When a worker is lost, the others
end and name it, and the same commands go on from the last checkpoint as if nothing had happened.
"""

import argparse
import faulthandler
import hashlib
import itertools
import json
import os
import re
import socket
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors are raised as well
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import tensorflow as tf

from energy_models import EGM
from train_models import BATCH_SIZE, EPOCHS, STEPS_PER_EPOCH, build_egm
from utils import DATASETS, sample_2d_data


def train(strategy, arguments):
    """Train from the last checkpoint on, or from the beginning, and print a digest of the weights."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    settings = (arguments.dataset, arguments.steps, arguments.batch_size, arguments.seed)
    check_equal(strategy, (settings, checkpoint and checkpoint.read_bytes()), "arguments or checkpoints")
    with strategy.scope():
        egm = EGM.load(checkpoint) if checkpoint else build_egm(arguments.seed, arguments.steps / STEPS_PER_EPOCH)
    steps_made = egm.num_steps

    def make_parts(context):
        size = context.get_per_replica_batch_size(arguments.batch_size)
        num_parts = context.num_replicas_in_sync // context.num_input_pipelines  # one for each device of this worker
        first = context.input_pipeline_id * num_parts

        def generate():
            for step in itertools.count(steps_made):
                rng = np.random.default_rng((arguments.seed, step))  # the same on all workers, and after a restart
                batch = sample_2d_data(arguments.dataset, arguments.batch_size, rng)
                yield from batch.reshape(-1, size, 2)[first : first + num_parts]

        return tf.data.Dataset.from_generator(generate, output_signature=tf.TensorSpec((size, 2), tf.float32))

    @tf.function
    def train_step(parts):  # as fit makes it; fit itself fails on several machines in Keras 3.15
        losses = strategy.run(egm.train_step, [next(parts)])
        return {name: strategy.reduce("MEAN", loss, axis=None) for name, loss in losses.items()}

    parts = iter(strategy.distribute_datasets_from_function(make_parts))
    for step in range(steps_made + 1, arguments.steps + 1):
        losses = train_step(parts)
        if step % arguments.every == 0 or step == arguments.steps:
            egm.reset_metrics()
            if arguments.index == 0:
                egm.save(arguments.checkpoint / f"step_{step:08d}.keras")
                for old in sorted(arguments.checkpoint.glob("step_*.keras"))[:-1]:
                    old.unlink()
                print(f"step {step}:", *(f"{name} {float(loss):.4f}" for name, loss in losses.items()), flush=True)
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in egm.get_weights())).hexdigest()
    check_equal(strategy, digest, "weights")  # until then nobody leaves
    print(f"worker {arguments.index} has weights {digest}")


def check_equal(strategy, value, what):
    """Raise ValueError unless a value is the same on all workers."""
    number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
    if len(set(strategy.gather(tf.constant([number], tf.int64), axis=0).numpy())) > 1:
        raise ValueError(f"the workers have different {what}")


def find_checkpoint(folder):
    """Return the path of the last checkpoint, None if there is none."""
    return max(folder.glob("step_*.keras"), default=None)


def find_missing(arguments):
    """Return the indices of the other workers at whose addresses nobody listens."""
    missing = []
    for index, address in enumerate(arguments.workers):
        host, _, port = address.rpartition(":")
        try:
            if index != arguments.index:
                socket.create_connection((host, int(port)), timeout=2).close()
        except OSError:
            missing.append(index)
    return missing


def wait_for_others(arguments):
    """Wait until all workers are there: TensorFlow would wait silently, for very long, and deaf to Ctrl-C."""
    end = time.monotonic() + arguments.wait
    with socket.create_server(("", int(arguments.workers[arguments.index].rpartition(":")[2]))) as server:
        server.settimeout(0.2)
        while missing := find_missing(arguments):
            if time.monotonic() > end:
                raise TimeoutError(f"{describe(arguments, missing)} did not come in {arguments.wait} s")
            try:
                server.accept()[0].close()
            except TimeoutError:
                pass


def describe(arguments, indices):
    """Write workers with their addresses."""
    return ", ".join(f"worker {index} ({arguments.workers[index]})" for index in indices)


def parse_arguments():
    """Return the arguments; the workers may be those of TF_CONFIG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", nargs="+", metavar="HOST:PORT", help="addresses of all workers")
    parser.add_argument("--index", type=int, help="which of them this one is, from 0; worker 0 writes the checkpoints")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="seen by all workers")
    parser.add_argument("--every", type=int, default=100, help="steps from one checkpoint to the next (100)")
    parser.add_argument("--dataset", choices=DATASETS, default="rings")
    parser.add_argument(
        "--steps", type=int, default=EPOCHS * STEPS_PER_EPOCH, help="until the learning rates are zero (5000)"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="points in a batch of all workers (512)")
    parser.add_argument("--seed", type=int, default=0, help="fixes everything that is drawn")
    parser.add_argument("--wait", type=int, default=600, help="seconds that the others have to start (600)")
    arguments = parser.parse_args()
    if arguments.workers is None:
        try:
            config = json.loads(os.environ["TF_CONFIG"])
            arguments.workers, arguments.index = config["cluster"].pop("worker"), config["task"]["index"]
            if config["cluster"]:
                raise ValueError(f"{', '.join(config['cluster'])} are no workers")
        except (KeyError, TypeError, ValueError) as error:
            parser.error(f"give --workers and --index, or TF_CONFIG with workers and the index of the task: {error!r}")
    if arguments.index not in range(len(arguments.workers)):
        parser.error(f"--index must be from 0 to {len(arguments.workers) - 1}, got {arguments.index}")
    if min(arguments.steps, arguments.every, arguments.batch_size) < 1:
        parser.error("--steps, --every and --batch-size must be at least 1")
    for address in arguments.workers:
        if not re.fullmatch(r"[^:]+:\d+", address) or arguments.workers.count(address) > 1:
            parser.error(f"--workers must be different addresses HOST:PORT, got {address!r}")
    return arguments


def main():
    """Train with the other workers, or say which of them is lost."""
    arguments = parse_arguments()
    task = {"type": "worker", "index": arguments.index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": arguments.workers}, "task": task})
    try:
        arguments.checkpoint.mkdir(parents=True, exist_ok=True)
        wait_for_others(arguments)
        faulthandler.dump_traceback_later(45, exit=True)  # if one of them is lost just now
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        faulthandler.cancel_dump_traceback_later()
        train(strategy, arguments)
    except tf.errors.OpError as error:
        named = [int(index) for index in re.findall(r"/job:worker/(?:replica:0/)?task:(\d+)", str(error))]
        named += [0] * ("CoordinationService/Heartbeat" in str(error))  # that is worker 0, frozen
        lost = find_missing(arguments) or [index for index in named if index != arguments.index][:1]
        if not lost:
            raise
        checkpoint = find_checkpoint(arguments.checkpoint)
        start = f"{checkpoint}, step {int(checkpoint.stem[5:])}" if checkpoint else "the beginning"
        sys.exit(f"worker {arguments.index}: lost {describe(arguments, lost)}; start all again to go on from {start}")
    except (OSError, ValueError) as error:
        sys.exit(f"worker {arguments.index}: {error}")


if __name__ == "__main__":
    main()
