"""Generates the Python stubs of every proto below this folder into shared/treadle/api.

`python protos/generate.py` writes them; `--check` writes nothing and fails where the
committed stubs differ. The proto root equals the import root, so imports need no rewriting.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.resources
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
STUBS = PROTOS.parent / "shared" / "treadle" / "api"

_OPERATIONS_MODULE = {
    "google.longrunning import operations_pb2": "google.longrunning import operations_proto_pb2",
    "google.longrunning.operations_pb2": "google.longrunning.operations_proto_pb2",
    "google_dot_longrunning_dot_operations__pb2": "google_dot_longrunning_dot_operations__proto__pb2",
}


def _google_includes(folder: Path) -> Path:
    """googleapis-common-protos, with the operations file under its canonical name too.

    The package ships it as operations_proto.proto; a contract that imports the name of the
    wheel would not compile in any other language.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    target = folder / "google" / "longrunning"
    target.mkdir(parents=True)
    shutil.copy(site / "google/longrunning/operations_proto.proto", target / "operations.proto")
    return site


def generate(output: Path) -> None:
    """Writes all stubs below `output`/treadle/api; raises RuntimeError when protoc fails."""
    with tempfile.TemporaryDirectory() as scratch:
        site = _google_includes(Path(scratch))
        builtin = importlib.resources.files("grpc_tools") / "_proto"
        files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
        code = protoc.main(
            [
                "protoc",
                f"-I{PROTOS}",
                f"-I{scratch}",
                f"-I{site}",
                f"-I{builtin}",
                f"--plugin=protoc-gen-mypy={_script('protoc-gen-mypy')}",
                f"--plugin=protoc-gen-mypy_grpc={_script('protoc-gen-mypy_grpc')}",
                f"--python_out={output}",
                f"--grpc_python_out={output}",
                f"--mypy_out=quiet:{output}",
                f"--mypy_grpc_out=quiet,only_async:{output}",
                *files,
            ]
        )
    if code:
        raise RuntimeError(f"protoc ended with status {code}")
    package = output / "treadle" / "api"
    for stub in [*package.rglob("*.py"), *package.rglob("*.pyi")]:
        text = stub.read_text()
        # operations.proto has no Python module of its own: the wheel's one serves.
        for old, new in _OPERATIONS_MODULE.items():
            text = text.replace(old, new)
        stub.write_text(text)
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def differences(fresh: Path) -> list[str]:
    """Names of stubs below `fresh` and STUBS that are not the same, sorted."""
    names = {
        str(path.relative_to(root))
        for root in (fresh, STUBS)
        for path in root.rglob("*")
        if path.suffix in {".py", ".pyi"}
    }
    return sorted(name for name in names if not _same(fresh / name, STUBS / name))


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and filecmp.cmp(one, other, shallow=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the committed stubs differ")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / "treadle" / "api"
        if arguments.check:
            stale = differences(fresh)
            for name in stale:
                print(f"stale stub: shared/treadle/api/{name} (run `make proto`)", file=sys.stderr)
            return 1 if stale else 0
        shutil.rmtree(STUBS, ignore_errors=True)
        shutil.copytree(fresh, STUBS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
