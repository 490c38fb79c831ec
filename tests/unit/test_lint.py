"""The lint itself: what it must find is planted, and must be found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{folder / 'services'}{os.pathsep}{folder / 'shared'}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("root", ["services", "shared"])
def test_mypy_reads_both_roots(tmp_path: Path, root: str):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("services", "shared"):
        package = tmp_path / name / f"planted_{name}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("count: int = 'one'\n" if name == root else "count: int = 1\n")
    result = run([str(BIN / "mypy")], tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{root}/planted_{root}/__init__.py:1: error" in result.stdout
    assert "Found 1 error" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("services/treadle_gateway/planted.py", "import treadle_registry", "The services talk through"),
        ("shared/treadle/text/planted.py", "import treadle_worker", "The shared package never"),
        ("shared/treadle/text/planted.py", "import treadle.nn.llama", "No torch outside the engine"),
        ("services/treadle_registry/planted.py", "import torch", "No torch outside the engine"),
        ("shared/treadle/queue/planted.py", "import treadle.rpc", "No gRPC in the engine"),
        ("services/treadle_worker/block_manager.py", "import treadle_worker.scheduler", "Inside the worker"),
    ],
)
def test_import_linter_finds_a_planted_import(tmp_path: Path, file: str, line: str, contract: str):
    shutil.copy(ROOT / ".importlinter", tmp_path)
    for name in ("services", "shared"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / file).open("a") as planted:
        planted.write(f"\n{line}\n")
    result = run([str(BIN / "lint-imports"), "--no-cache"], tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = [row for row in result.stdout.splitlines() if row.rstrip().endswith("BROKEN")]
    assert len(broken) == 1
    assert broken[0].startswith(contract)


BANNED = {
    "pickle": "import pickle",
    "joblib": "import joblib",
    "multiprocessing": "from multiprocessing import Pipe",
    "numpy.load": "import numpy\n\nnumpy.load('weights.npy')",
    "torch.load": "import torch\n\ntorch.load('weights.pt')",
    "torch.hub": "from torch import hub",
    "torch.jit.load": "import torch\n\ntorch.jit.load('model.pt')",
    "runpy": "import runpy",
    "importlib.util.spec_from_file_location": "import importlib.util\n\n"
    "importlib.util.spec_from_file_location('modeling', 'modeling.py')",
}


@pytest.mark.parametrize("root", ["services", "shared"])
def test_ruff_refuses_what_runs_foreign_code(tmp_path: Path, root: str):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / root / "planted"
    planted.mkdir(parents=True)
    for name, code in BANNED.items():
        (planted / f"{name.replace('.', '_')}.py").write_text(code + "\n")
    result = run([str(BIN / "ruff"), "check", "--output-format", "concise"], tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    refused = [line for line in result.stdout.splitlines() if "TID251" in line]
    for name in BANNED:
        file = f"{name.replace('.', '_')}.py:"
        assert any(file in line and f"`{name}`" in line for line in refused), (name, refused)
    print(f"{len(BANNED)} ways to run foreign code are refused in {root}")


def test_ruff_refuses_eval_and_exec(tmp_path: Path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / "services" / "planted.py"
    planted.parent.mkdir()
    planted.write_text("eval(input())\nexec(input())\n")
    result = run([str(BIN / "ruff"), "check", "--output-format", "concise"], tmp_path)
    assert {code for code in ("S102", "S307") if code in result.stdout} == {"S102", "S307"}
