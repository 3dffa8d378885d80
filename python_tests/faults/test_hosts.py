"""Several hosts of one machine (`hosts`): the same results as one, and what is left when one goes.

`python python_tests/faults/test_hosts.py RECORD.json` runs all of it and writes what it measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hosts import Hosts, refusal
from hosts_program import METHODS, draws
from safetensors.torch import load_file

HERE = Path(__file__).parent
TIMEOUT = 5  # seconds, --timeout
# A host that is silent for three seconds is taken off, instead of fifteen; those that are left wait
# three seconds for others, instead of thirty.
RENDEZVOUS = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
SMALL = "--device cpu --width 16 --head-width 8 --depth 2 --rank 2 --batch-size 12 --tracker none"


@pytest.fixture(autouse=True, scope="module")
def _able():
    if reason := refusal():
        pytest.skip(reason)


def _env():
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    # torchrun 2.13 that is started anew on a host otherwise waits for the others for ever: they do
    # not tell it again where their store is.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return os.environ | store | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _training(out, steps, save_every=20):
    words = f"--out {out} {SMALL} --steps {steps} --save-every {save_every} --timeout {TIMEOUT}"
    return ["-m", "hos_ext.app.cli", "train", *words.split()]


def _torchrun(program, nodes, restarts=0):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"),
        *(f"--nnodes={nodes}", "--rdzv-backend=c10d", "--rdzv-endpoint=host0:29400"),
        *("--rdzv-id=test", f"--rdzv-conf={RENDEZVOUS}", f"--max-restarts={restarts}"),
        *program,
    ]


def _over(count, program):
    """Runs a program on so many hosts, to its end."""
    with Hosts(count) as hosts:
        started = [hosts.start(i, _torchrun(program, count), _env()) for i in range(count)]
        for each in started:
            told, _ = each.communicate(timeout=120)
            assert each.returncode == 0, told


def _alone(out, steps):
    command = [sys.executable, *_training(out, steps)]
    subprocess.run(command, env=_env(), check=True, capture_output=True, timeout=120)
    return out


def _newest(out):
    found = sorted((out / "checkpoints").glob("step-????????"))
    return int(found[-1].name[5:]) if found else 0


def _until(out, step):
    """Waits for a checkpoint of this step or a later one; its step."""
    end = time.monotonic() + 90
    while _newest(out) < step:
        assert time.monotonic() < end, f"no checkpoint of step {step}, only {_newest(out)}"
        time.sleep(0.02)
    return _newest(out)


def _said(output):
    """The line in which the training says why it stopped."""
    return next((line for line in output.splitlines() if line.startswith("hos-ext: ")), output)


def _difference(out, other):
    """The largest difference of weights and of losses of two runs, relative to the largest."""
    pairs = [load_file(folder / "model" / "model.safetensors") for folder in (out, other)]
    assert pairs[0].keys() == pairs[1].keys()
    flat = [torch.cat([w[name].flatten().double() for name in sorted(w)]) for w in pairs]
    rows = [json.loads((folder / "metrics.json").read_text())["history"] for folder in (out, other)]
    names = ("loss", "validation", "gradient_norm")
    steps = [[row["step"] for row in each] for each in rows]
    assert steps[0] == steps[1]
    curves = [
        torch.tensor([[row[name] for name in names] for row in each]).double() for each in rows
    ]
    largest = [float((a - b).abs().max() / b.abs().max()) for a, b in (flat, curves)]
    return max(largest)


# ------------------------------------------------------------------------ what is done and measured


def training(count, folder, alone):
    """Training over so many hosts, to its end."""
    out = folder / f"over-{count}"
    _over(count, _training(out, 60))
    return {"hosts": count, "difference": _difference(out, alone)}


def chains(count, folder):
    """Chains over so many hosts: whether all ranks have the draws of one process."""
    _over(count, [str(HERE / "hosts_program.py"), str(folder)])
    found = [torch.load(folder / f"draws-{i}.pt", weights_only=True) for i in range(count)]
    same = all(torch.equal(each[name], draws(name)) for each in found for name in METHODS)
    return {"hosts": count, "draws": sum(draws(name).numel() for name in METHODS), "equal": same}


def stopping(count, how, folder):
    """A host of several goes in the middle, and nobody restarts: what the first host says, when."""
    out = folder / f"{how}-{count}"
    with Hosts(count) as hosts:
        command = _torchrun(_training(out, 100_000), count)
        started = [hosts.start(i, command, _env()) for i in range(count)]
        _until(out, 20)
        getattr(hosts, how)(count - 1)
        begin = time.monotonic()
        told = [each.communicate(timeout=60)[0] for each in started[:-1]]
        seconds = time.monotonic() - begin
        codes = [each.returncode for each in started[:-1]]
    return {
        "hosts": count,
        "how": how,
        "seconds": round(seconds, 1),
        "codes": codes,
        "said": [_said(each).replace(str(out), "RUN") for each in told],
    }


def going_on(how, folder, steps=1200, force=False):
    """One of two hosts goes and comes back: the other goes on alone, then both to the end."""
    out = folder / f"elastic-{how}"
    with Hosts(2) as hosts:
        program = _training(out, steps) + ["--force"] * force
        command = _torchrun(program, "1:2", restarts=3)
        started = [hosts.start(i, command, _env()) for i in range(2)]
        gone = _until(out, 20)
        getattr(hosts, how)(1)
        begin = time.monotonic()
        alone = _until(out, gone + 40)
        seconds = time.monotonic() - begin
        if how == "cut":
            hosts.join(1)
        else:
            started[1] = hosts.start(1, command, _env())
        said = []
        for each in started:
            said.append(each.communicate(timeout=240)[0])
            assert each.returncode == 0, said
        # The first process of all says so at each start: together, alone, together again.
        starts = "".join(said).count(f" {steps} steps; to ")
        ends = {
            "starts": starts,
            "gone": gone,
            "alone_at": alone,
            "alone_after_seconds": round(seconds, 1),
        }
    difference = _difference(out, _alone(folder / f"undisturbed-{how}", steps))
    return {"how": how, **ends, "difference": difference}


def resuming(folder):
    """A host is killed and the same command is given again: as if nothing had happened."""
    runs = [folder / name for name in ("killed", "undisturbed")]
    command = [_torchrun([*_training(out, 200), "--continue"], 2) for out in runs]
    with Hosts(2) as hosts:
        started = [hosts.start(i, command[0], _env()) for i in range(2)]
        at = _until(runs[0], 20)
        hosts.kill(1)
        started[0].communicate(timeout=60)
    for each in range(2):
        _over(2, command[each][command[each].index("--max-restarts=0") + 1 :])
    files = [load_file(out / "model" / "model.safetensors") for out in runs]
    same = all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    return {"resumed_from": at, "bitwise": same}


# ---------------------------------------------------------------------------------------- the tests

# Sums over hosts are taken in another order: 2^-24 a term, and 60 to 500 steps carry it on.
ROUNDING = 1e-4


@pytest.mark.slow
def test_two_hosts_train_as_one_process(tmp_path):
    found = training(2, tmp_path, _alone(tmp_path / "alone", 60))
    assert found["difference"] <= ROUNDING


@pytest.mark.slow
def test_three_hosts_train_as_one_process(tmp_path):
    found = training(3, tmp_path, _alone(tmp_path / "alone", 60))
    assert found["difference"] <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_chains_over_hosts_are_bitwise_those_of_one_process(tmp_path, count):
    assert chains(count, tmp_path)["equal"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "how"), [(2, "kill"), (2, "cut"), (3, "cut")])
def test_where_a_host_goes_the_others_stop_in_time_and_say_so(tmp_path, count, how):
    found = stopping(count, how, tmp_path)
    # What follows the timeout: the process ends, torchrun looks and ends. Slow on a busy machine.
    assert found["seconds"] < TIMEOUT + 15
    assert found["codes"] == [1] * (count - 1)
    for said in found["said"]:
        assert said.startswith(
            f"hos-ext: train: every process must answer within timeout {TIMEOUT} "
        )
        assert "last checkpoint: RUN/checkpoints/step-" in said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_host_that_comes_back_is_taken_in_and_nothing_is_lost(tmp_path, how):
    assert going_on(how, tmp_path)["difference"] <= ROUNDING


@pytest.mark.slow
def test_the_same_hosts_go_on_bit_for_bit(tmp_path):
    assert resuming(tmp_path)["bitwise"]


@pytest.mark.slow
def test_a_forced_run_is_not_replaced_when_a_host_comes_back(tmp_path):
    found = going_on("kill", tmp_path, force=True)
    assert found["difference"] <= ROUNDING


def test_a_host_has_its_own_name_and_sees_the_others_until_it_is_cut():
    ping = ["ping", "-c1", "-W1", "host0"]
    if shutil.which("ping") is None:
        code = "import socket; socket.create_connection(('host0', 9), 1)"
        ping = [sys.executable, "-c", code]
    with Hosts(2) as hosts:
        assert hosts.start(1, ["hostname"]).communicate(timeout=30)[0] == "host1\n"
        connected = hosts.start(1, ping).communicate(timeout=30)[0]
        hosts.cut(1)
        cut = hosts.start(1, ping).communicate(timeout=30)[0]
        assert connected != cut
        spaces = [hosts._space(i) for i in range(2)]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(space in left for space in spaces)


# --------------------------------------------------------------------------------------- the record


def record(path: Path) -> None:
    """Runs everything and writes what was measured."""
    if reason := refusal():
        sys.exit(reason)
    found: dict[str, object] = {"torch": torch.__version__, "timeout": TIMEOUT}
    found["rendezvous"] = RENDEZVOUS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = _alone(folder / "alone", 60)
        pairs = [(2, "kill"), (2, "cut"), (3, "kill"), (3, "cut")]
        work = {
            "stopping": lambda: [stopping(*pair, folder) for pair in pairs],
            "going_on": lambda: [going_on(how, folder) for how in ("cut", "kill")],
            "forced": lambda: going_on("kill", folder / "forced", force=True),
            "resuming": lambda: resuming(folder),
            "chains": lambda: [chains(count, folder) for count in (2, 3)],
            "training": lambda: [training(count, folder, alone) for count in (2, 3)],
        }
        for part, measure in work.items():
            found[part] = measure()
            print(part, json.dumps(found[part], indent=2), flush=True)
            path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
