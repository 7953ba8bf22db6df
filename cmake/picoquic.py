"""Fetches the sources of picoquic and picotls into the named folder, unless they are there already.

The sources are those that the PyPI package `aiopquic` carries; nothing else of it is used. CMake builds
them with the extension.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packages import MARKER, Sdist, cache_folder, locked

PACKAGE = Sdist("aiopquic", "0.6.1", "72579146e0f22859a5a7c197246604fef460b9e1b578a2910156dff7679efd29", isolated=True)


def main() -> None:
    into = Path(sys.argv[1]).resolve()
    with locked(cache_folder() / "lock"):
        for part in ("picotls", "picoquic"):
            marker = into / part / MARKER
            if not marker.exists() or marker.read_text() != PACKAGE.sha256:
                PACKAGE.unpack(f"third_party/{part}", into / part)


if __name__ == "__main__":
    main()
