"""A store as the first release wrote it: database version 1, no format.json, manifests of version 1.

It was made by that release's own code: two models, "prod" moved forth and back, "canary", "gone" deleted, and
four operations, the last of which was cut off.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "integration" / "registry" / "data" / "store-v1.tar.gz"
FIRST = "sha256:f1f4509817f54b5a462df68c340eb16fcdd4e6ace0445428206f069c8e4f5c72"
SECOND = "sha256:c9ea2ad4fa167182a128f1575e711533721519e87e96dc48e98be72a7ab66c89"
HISTORY = {"prod": [FIRST, SECOND, FIRST], "canary": [FIRST], "gone": ["", SECOND]}
"""Of each alias, newest first."""
REQUESTS = ["cut-off", "import-nobody", "", "import-first"]
"""Of each operation, newest first; "": it was given none."""


def unpack_old_store(folder: Path) -> Path:
    """The store, unpacked below `folder`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "store"
