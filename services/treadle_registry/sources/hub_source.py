"""What of a hub a client asks for: a repository, a revision, a variant of its weights or a GGUF file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from treadle.errors import invalid_field
from treadle.transfer.file_names import is_file_name

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})?")
_REVISION = re.compile(rf"{_PART}(?:/{_PART})*")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAX_REPOSITORY = 96
_MAX_REVISION = 255
DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A model on the hub that the registry's environment names (HF_ENDPOINT); never an address."""

    repository: str
    """"owner/name", or "name" alone."""
    revision: str = ""
    """Branch, tag or commit; empty: main."""
    variant: str = ""
    """Of the weight files: "fp16" takes model.fp16.safetensors."""
    gguf_file: str = ""
    """The one file to take from a repository of GGUF files."""
    local_files_only: bool = False
    """Nothing leaves the machine."""

    kind: ClassVar = "hub"
    field: ClassVar = "hub"

    @property
    def wanted_revision(self) -> str:
        """The revision, the default one included."""
        return self.revision or DEFAULT_REVISION

    def check(self) -> None:
        """Raises InvalidArgument that names the field of the request."""
        self._check_repository()
        self._check_revision()
        if self.variant and not _VARIANT.fullmatch(self.variant):
            raise invalid_field(
                "hub.variant",
                "must be what stands in the names of the weight files (fp16 in model.fp16.safetensors); got "
                f"{self.variant[:100]!r}",
            )
        if self.gguf_file and not (is_file_name(self.gguf_file) and self.gguf_file.endswith(".gguf")):
            raise invalid_field(
                "hub.gguf_file",
                "must be the name of a .gguf file at the top of the repository: letters, digits, '.', '_' "
                f"and '-'; got {self.gguf_file[:100]!r}",
            )
        if self.gguf_file and self.variant:
            raise invalid_field("hub.variant", "belongs to safetensors; leave it out beside gguf_file")

    def _check_repository(self) -> None:
        name = self.repository
        if (
            not _REPOSITORY.fullmatch(name)
            or len(name) > _MAX_REPOSITORY
            or any(mark in name for mark in ("..", "--"))
            or name.endswith((".git", ".", "-"))
        ):
            raise invalid_field(
                "hub.repository",
                f'must be "owner/name" of at most {_MAX_REPOSITORY} letters, digits, ".", "_" and "-", as '
                f"the hub has it, and no address; got {name[:100]!r}",
            )

    def _check_revision(self) -> None:
        revision = self.wanted_revision
        if (
            not _REVISION.fullmatch(revision)
            or len(revision) > _MAX_REVISION
            or ".." in revision
            or revision.endswith((".lock", "."))
        ):
            raise invalid_field(
                "hub.revision", f"must be a branch, a tag or a commit; got {revision[:100]!r}"
            )

    def at(self, revision: str) -> str:
        """For people: "hub:owner/name@revision", and what was chosen of it."""
        chosen = f"/{self.gguf_file}" if self.gguf_file else f" ({self.variant})" if self.variant else ""
        return f"hub:{self.repository}{'@' if revision else ''}{revision}{chosen}"

    def __str__(self) -> str:
        return self.at(self.revision)
