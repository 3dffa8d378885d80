"""The CUDA kernels on a machine without a GPU: every thread of theirs runs on the host.

`build` compiles csrc/*/*.cu with the host compiler against emulator/, and `emulated` puts the
module in the place of the CPU kernels: `pytest -p emulation python_tests/ops/test_steps.py` runs
the tests of the steps on the CUDA kernels. It checks arithmetic, indices, barriers and
(HOS_EMULATOR_FLAGS=-fsanitize=address) memory; speed, and races between warps or blocks, need a
GPU.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hos_ext.ops import _native as native
from hos_ext.ops._native import connect

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = Path(__file__).resolve().parent / "emulator"
SHARED = "extern __shared__ __align__(16) unsigned char memory[];"


def build(folder: Path) -> Path:
    """The native module with emulated CUDA kernels."""
    import pybind11

    sources = folder / "csrc"
    sources.mkdir()
    for path in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
        copy = sources / path.relative_to(ROOT / "csrc")
        copy.parent.mkdir(exist_ok=True)
        text = path.read_text().replace(SHARED, "unsigned char* memory = emulator_shared;")
        copy.write_text(text)
    flags = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
    flags += " -Wno-unknown-pragmas -Wno-maybe-uninitialized -Wno-uninitialized"
    extra = shlex.split(os.environ.get("HOS_EMULATOR_FLAGS", ""))
    includes = [EMULATOR, sources, sysconfig.get_paths()["include"], pybind11.get_include()]
    common = ["g++", *flags.split(), *extra, *(f"-I{path}" for path in includes)]
    info = ("HOS_CUDA", 'HOS_CUDA_ARCHS="none"', 'HOS_VERSION="0"', 'HOS_COMPILER="emulator"')
    common_sources = [sources / "losses/loss.cpp", sources / "python/table.cpp"]
    python = [path for path in sources.glob("python/*.cpp") if path not in common_sources]
    cpu, cuda = ["-DHOS_ISA=baseline"], ["-DHOS_ISA=cuda", "-x", "c++"]
    jobs = [(EMULATOR / "emulator.cpp", [])]
    jobs += [(path, [f"-D{d}" for d in info]) for path in python]
    jobs += [(path, cpu) for path in (*sources.rglob("*_cpu.cpp"), *common_sources)]
    jobs += [(path, cuda) for path in (*sources.rglob("*.cu"), *common_sources)]
    objects = []
    for number, (path, options) in enumerate(jobs):
        objects.append(folder / f"{number}.o")
        subprocess.run([*common, *options, "-c", str(path), "-o", str(objects[-1])], check=True)
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*common, "-shared", *map(str, objects), "-o", str(module)], check=True)
    return module


def load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(module: ModuleType) -> Iterator[None]:
    """The operators on CPU tensors by the emulated kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_C", module)
        patch.setattr(native, "queue_of", lambda _: (0, 0))
        for name in ("direct_step", "direct_loss"):  # they know the CPU kernels alone
            patch.setattr(module, name, lambda **_: None)
        connect(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: all tests of this run, on HOS_EMULATED_MODULE or one built now."""
    given = os.environ.get("HOS_EMULATED_MODULE")
    folder = Path(given).parent if given else Path(tempfile.mkdtemp())
    stack = contextlib.ExitStack()
    stack.enter_context(emulated(load(Path(given) if given else build(folder))))
    config.add_cleanup(stack.close)
