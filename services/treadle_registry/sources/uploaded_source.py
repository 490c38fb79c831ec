"""What of uploads a client asks to be imported: names, and the content that each is to have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from treadle.errors import invalid_field
from treadle.transfer.file_names import is_model_file
from treadle_registry.names import check_digest

_MAX_FILES = 1024
_MAX_SOURCE = 200


@dataclass(frozen=True, slots=True)
class UploadedSource:
    """Files that UploadBlob brought: together a Hugging Face folder, or one .gguf."""

    files: tuple[tuple[str, str], ...]
    """Name and digest of each."""
    source: str = ""
    """Where it came from, for people."""

    kind: ClassVar = "uploaded"
    field: ClassVar = "uploaded"

    def __post_init__(self) -> None:
        # JSON knows no tuples.
        object.__setattr__(self, "files", tuple((name, digest) for name, digest in self.files))

    def check(self) -> None:
        """Raises InvalidArgument that names the field of the request."""
        if not 1 <= len(self.files) <= _MAX_FILES:
            raise invalid_field("uploaded.files", f"must be 1 to {_MAX_FILES}; got {len(self.files)}")
        known: set[str] = set()
        for number, (name, digest) in enumerate(self.files):
            field = f"uploaded.files[{number}]"
            if not is_model_file(name):
                raise invalid_field(
                    f"{field}.name",
                    "must be a plain file name (letters, digits, '.', '_' and '-', a letter or digit first), "
                    "additional_chat_templates/<name>.jinja or <n>_<Module>/config.json; "
                    f"got {name[:100]!r}",
                    reason="PATH_OUTSIDE",
                )
            if name in known:
                raise invalid_field(f"{field}.name", f"{name} is there twice")
            known.add(name)
            check_digest(digest, f"{field}.digest")
        for number, (name, _) in enumerate(self.files):
            if (folder := name.partition("/")[0]) != name and folder in known:
                raise invalid_field(
                    f"uploaded.files[{number}].name",
                    f"{folder} is a folder here and the name of another file; leave one of the two out",
                )
        if len(self.source) > _MAX_SOURCE or not self.source.isprintable():
            raise invalid_field("uploaded.source", f"must be printable, of at most {_MAX_SOURCE} characters")

    def __str__(self) -> str:
        return self.source or f"upload of {len(self.files)} files"
