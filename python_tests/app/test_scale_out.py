"""Training on several processes: the same curve, and a killed process put up again."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_training import near, run

from hos_ext.app import data

PROGRAM = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from test_training import build, data, run, training
out, options, kill = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
apart = options.pop("apart", False)
classes = options.pop("classes", None)
source, model = data.open_source("digits", label="label" if classes else None), build()
if classes:
    from test_conditional_runs import build as conditional
    model = conditional()
rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if kill and restarts == 0 and rank == 1:
    calls = []
    def count(*_):
        calls.append(0)
        if len(calls) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_pre_hook(count)
if apart:  # as on a disk of its own: the second process finds no checkpoint
    run(source, model=build(), out=out, steps=4, **options)
    out = out + "/other" if rank else out
    try:
        run(source, model=model, out=out, steps=8, resume=True, **options)
    except RuntimeError as error:
        Path(sys.argv[1], f"told-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()
    sys.exit()
trained = run(source, model=model, out=out, resume=True, **options)
if rank == 0:
    from safetensors.torch import save_file
    save_file(trained.model.state_dict(), out + "/trained.safetensors")
    rows = [row._asdict() for row in trained.history]
    Path(out, "told.json").write_text(json.dumps([trained.resumed_from, restarts, rows]))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def alone():
    return run(data.open_source("digits"), log_every=3)


def launched(folder, processes, options, *, kill=0, restarts=0):
    """Trains under torchrun; the model, the step resumed from, the restarts and the curve."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    here = pathlib.Path(__file__).parent
    places = map(str, (here, *here.parents[:2]))  # this room's tests, what all share, the package
    paths = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    told = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", f"--max-restarts={restarts}"),
            *(str(program), str(folder), json.dumps(options), str(kill)),
        ],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_GLOO_LAZY_INIT": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert told.returncode == 0, told.stderr
    if options.get("apart"):
        return [(folder / f"told-{rank}").read_text() for rank in range(processes)]
    from safetensors.torch import load_file

    resumed, count, rows = json.loads((folder / "told.json").read_text())
    return load_file(folder / "trained.safetensors"), resumed, count, rows


class _Weights:
    def __init__(self, weights):
        self.state_dict = lambda: weights


def agrees(alone, weights, rows):
    assert near(_Weights(weights), alone.model, 2e-5)
    for row, expected in zip(rows, alone.history, strict=True):
        for name, value in expected._asdict().items():
            if name != "gradient_variance":  # from the rows of one process
                assert row[name] == pytest.approx(value, rel=1e-4), name
    return True


def test_two_processes_train_to_the_same_curve_as_one(alone, tmp_path):
    options = {"log_every": 3, "accumulate": 2}
    weights, resumed, restarts, rows = launched(tmp_path, 2, options)
    assert (resumed, restarts) == (0, 0)
    assert agrees(alone, weights, rows)
    # Two halves of the batch, not the whole batch twice.
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_learn_classes_as_one(tmp_path):
    from test_conditional_runs import build as conditional

    source = data.open_source("digits", label="label")
    options = {"log_every": 3, "condition_dropout": 0.3}
    alone = run(source, model=conditional(), **options)
    weights, *_, rows = launched(tmp_path, 2, options | {"classes": True})
    assert agrees(alone, weights, rows)


def test_a_killed_process_is_put_up_again_and_training_goes_on(alone, tmp_path):
    options = {"log_every": 3, "save_every": 4}
    # More than one restart: on a busy machine gloo at times fails to connect after the first.
    weights, resumed, restarts, rows = launched(tmp_path, 2, options, kill=7, restarts=4)
    assert resumed == 4
    assert restarts >= 1
    assert agrees(alone, weights, rows)


def test_processes_that_find_other_checkpoints_are_refused(tmp_path):
    told = launched(tmp_path, 2, {"apart": True, "decay": "constant", "log_every": 3})
    refused = (
        "train: every process must find the same checkpoints (out on a disk that all share), got "
        "those of steps 4, 0"
    )
    assert told == [refused, refused]
