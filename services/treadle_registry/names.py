"""What may be a name, a digest or a path here: one strict pattern each, and no way out of a folder."""

from __future__ import annotations

import re
from pathlib import Path

from treadle.errors import InvalidArgument, invalid_field
from treadle.transfer.file_names import is_file_name

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ALIAS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")

MAX_PATH = 4096


def is_digest(text: str) -> bool:
    """Whether it is "sha256:" and 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(text: str, field: str) -> str:
    """The digest; raises InvalidArgument that names `field`."""
    if not is_digest(text):
        raise invalid_field(field, f'must be "sha256:" and 64 hexadecimal digits; got {text[:100]!r}')
    return text


def check_alias(text: str, field: str) -> str:
    """The alias; raises InvalidArgument that names `field`."""
    if not _ALIAS.fullmatch(text):
        raise invalid_field(
            field,
            "must be 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first and last; "
            f"got {text[:100]!r}",
        )
    return text


def check_file_name(name: str, where: str) -> str:
    """A plain file name out of the untrusted `where`; raises InvalidArgument (PATH_OUTSIDE)."""
    if not is_file_name(name):
        raise InvalidArgument(
            f"{where} names the file {name[:100]!r}; file names here are letters, digits, '.', '_' and '-'",
            reason="PATH_OUTSIDE",
        )
    return name


def file_inside(folder: Path, name: str) -> Path:
    """The regular file `name` directly in `folder`, links followed.

    Raises InvalidArgument: MISSING_FILE when it is not there, PATH_OUTSIDE when a link leads out.
    """
    check_file_name(name, folder.name)
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InvalidArgument(f"{name} is missing; the folder must hold it", reason="MISSING_FILE") from error
    if real.parent != folder.resolve():
        raise InvalidArgument(
            f"{name} is a link that leaves its folder (to {str(real)[:200]}); import a copy without links "
            "(cp -rL)",
            reason="PATH_OUTSIDE",
        )
    if not real.is_file():
        raise InvalidArgument(
            f"{name} is not a regular file; put the file itself in its place", reason="MISSING_FILE"
        )
    return real


def check_source_path(text: str, field: str) -> Path:
    """A path that is absolute and has no ".."; raises InvalidArgument that names `field`."""
    path = Path(text) if len(text) <= MAX_PATH and "\0" not in text else None
    if path is None or not path.is_absolute() or ".." in path.parts:
        raise invalid_field(
            field,
            f"must be an absolute path without '..', of at most {MAX_PATH} characters; got {text[:200]!r}",
        )
    return path


def source_path(text: str, field: str) -> Path:
    """A path of a source on this machine, links followed; raises InvalidArgument that names `field`."""
    try:
        return check_source_path(text, field).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise invalid_field(
            field,
            f"{text[:200]} does not exist on the registry's machine; give the path of a model that does",
            reason="SOURCE_NOT_FOUND",
        ) from error
