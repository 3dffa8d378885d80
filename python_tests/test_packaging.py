"""What an installation promises: build_info, one version, light imports, the shipped marker."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hos_ext
from hos_ext import checks

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_build_info_has_the_promised_keys_and_kinds():
    kinds = {
        "version": str,
        "compiler": str,
        "cpu_level": str,
        "openmp": bool,
        "threads": int,
        "cuda_built": bool,
        "cuda_archs": str,
        "cuda_reason": str,
        "torch": str,
    }
    info = hos_ext.build_info()
    assert info.keys() == kinds.keys()
    assert all(isinstance(info[key], kind) for key, kind in kinds.items()), info
    assert info["cpu_level"] in {"baseline", "x86_v3", "x86_v4"}
    assert info["threads"] == torch.get_num_threads()
    assert info["torch"] == torch.__version__
    assert bool(info["cuda_archs"]) == info["cuda_built"] == (not info["cuda_reason"])


def test_python_m_hos_ext_prints_build_info():
    result = run_python("-W", "error", "-m", "hos_ext", OMP_NUM_THREADS="1")
    assert (result.returncode, result.stderr) == (0, "")
    expected = {**hos_ext.build_info(), "threads": 1}
    assert result.stdout.splitlines() == [f"{key}: {value}" for key, value in expected.items()]


def test_the_version_is_the_same_everywhere():
    version = hos_ext.build_info()["version"]
    cmake = re.search(r"project\(hos_ext VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    pyproject = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert (cmake[1], pyproject[1]) == (version, version)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("hos_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hos_ext is on the path but not installed")
    assert installed == version


def test_import_brings_in_torch_and_numpy_alone():
    before = "import sys, torch, numpy; before = set(sys.modules); import hos_ext; "
    show = "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    result = run_python("-W", "error", "-c", before + show)
    assert (result.returncode, result.stderr) == (0, "")
    assert set(result.stdout.split()) - {"torch", "hos_ext"} <= sys.stdlib_module_names


def test_import_leaves_cuda_alone():
    code = "import hos_ext, torch; hos_ext.build_info(); print(torch.cuda.is_initialized())"
    assert run_python("-c", code).stdout == "False\n"


def test_an_unknown_cpu_level_is_refused_by_name():
    result = run_python("-c", "import hos_ext", HOS_CPU_LEVEL="sse")
    assert result.returncode == 1
    assert "ImportError: HOS_CPU_LEVEL must be baseline" in result.stderr
    assert result.stderr.rstrip().endswith("got sse")


def test_type_information_is_shipped():
    package = Path(hos_ext.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_C.pyi").is_file()


def test_the_wheel_needs_no_more_than_torch_numpy_and_safetensors():
    try:
        requirements = importlib.metadata.requires("hos_ext") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hos_ext is on the path but not installed")
    assert [r for r in requirements if "extra ==" not in r] == [
        "torch>=2.6",
        "numpy",
        "safetensors",
    ]


def project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names_of(requirements):
    """The distributions of some requirements, in one spelling."""
    return {re.match(r"[\w.-]+", each)[0].lower().replace("_", "-") for each in requirements}


# Distributions that have another name than what is imported, and those that others bring.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
BROUGHT = {"fsspec": "datasets", "pyarrow": "datasets", "xarray": "arviz-base"}


def test_app_is_all_of_its_parts_and_every_part_is_named_by_the_module_that_needs_it():
    extras = project()["optional-dependencies"]
    assert extras["app"] == ["hos_ext[cli,images,hub,track]"]
    for module, extra in checks.EXTRAS.items():
        wanted = BROUGHT.get(module) or DISTRIBUTIONS.get(module, module.replace("_", "-"))
        assert wanted.lower() in names_of(extras[extra]), module
    named = {BROUGHT.get(m) or DISTRIBUTIONS.get(m, m.replace("_", "-")) for m in checks.EXTRAS}
    for part in ("cli", "images", "hub", "track"):
        assert names_of(extras[part]) <= {name.lower() for name in named} | {"huggingface-hub"}


def test_every_module_that_is_required_has_an_extra():
    """All calls of `require` with a name written out, and safetensors, which is no extra."""
    asked = set()
    for path in (ROOT / "hos_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
            if called and isinstance(node.args[1], ast.Constant):
                asked.add(node.args[1].value.partition(".")[0])
    assert len(asked) > 12
    assert asked - checks.EXTRAS.keys() <= {"safetensors"}


@pytest.mark.parametrize(("module", "extra"), checks.EXTRAS.items())
def test_what_is_missing_is_named_by_its_extra(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError) as error:
        checks.require("here", module)
    told = f"here: {module} must be installed (pip install hos_ext[{extra}]), got: "
    assert str(error.value).startswith(told)


def test_the_constraints_hold_what_the_package_needs():
    told = project()
    extras = told["optional-dependencies"]
    wanted = names_of(told["dependencies"])
    for part in ("cli", "images", "hub", "track"):
        wanted |= names_of(extras[part])
    pinned = names_of(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"
    )
    assert wanted <= pinned


def test_raw_cells_stay_out_of_the_source_distribution():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    cells = [path.relative_to(ROOT).as_posix() for path in (ROOT / "bench").rglob("*.jsonl")]
    assert len(cells) > 5
    for cell in cells:
        assert any(fnmatch.fnmatch(cell, pattern) for pattern in settings["sdist"]["exclude"]), cell


# ---------------------------------------------------------------- what the build says of nvcc


def configured(folder, nvcc, wish="AUTO", **options):
    """What CMake says when it is configured with a compiler for CUDA, a script of these lines."""
    cmake = shutil.which("cmake")
    pybind11 = pytest.importorskip("pybind11")
    if cmake is None:
        pytest.skip("needs cmake")
    command = [cmake, "-S", str(ROOT), "-B", str(folder / "build"), f"-DHOS_CUDA={wish}"]
    command += [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    command += [f"-D{name}={value}" for name, value in options.items()]
    env = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    env.pop("CUDACXX", None)
    if nvcc is not None:
        script = folder / "nvcc"
        script.write_text("#!/bin/sh\n" + nvcc)
        script.chmod(0o755)
        env["CUDACXX"] = str(script)
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


REFUSES = """echo '/usr/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! \
gcc versions later than 11 are not supported!' >&2; exit 1
"""


@pytest.mark.parametrize(
    ("nvcc", "said"),
    [
        (REFUSES, "error: #error -- unsupported GNU version! gcc versions later than 11 are not"),
        ("echo 'nvcc fatal   : Value c++17 is not defined' >&2; exit 1\n", "fatal : Value c++17 "),
        ("kill -SEGV $$\n", "it ended with "),
    ],
)  # fmt: skip
def test_an_nvcc_that_does_not_work_is_quoted(tmp_path, nvcc, said):
    """AUTO goes on without and says so; ON ends."""
    code, text = configured(tmp_path, nvcc)
    assert code == 0, text
    assert "hos_ext builds without CUDA kernels: nvcc was found and does not work: " in text
    assert said in text
    code, text = configured(tmp_path, nvcc, "ON")
    assert code != 0
    assert "HOS_CUDA=ON needs a working nvcc, but nvcc was found and does not work: " in text
    assert said in text
    assert "put it on PATH" not in text


def test_options_of_the_build_that_are_unknown_are_refused_by_name(tmp_path):
    code, text = configured(tmp_path, None, "MAYBE")
    assert code != 0
    assert "HOS_CUDA must be AUTO, ON or OFF, got MAYBE" in text
    code, text = configured(tmp_path, None, "OFF", HOS_CUDA_ARCHS="80;volta")
    assert code != 0
    assert "HOS_CUDA_ARCHS must be CMake's CUDA_ARCHITECTURES, such as 80-real;90, got" in text
