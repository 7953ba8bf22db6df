"""Fetches the sources of picoquic and picotls into the given folder unless they are there, and prints those to compile.

They come from the PyPI package `aiopquic`; nothing else of it is used. CMake builds them with the extension, and
scripts/fuzz with a sanitizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packages import MARKER, Sdist, cache_folder, locked

# of picoquic: other systems, other TLS libraries, and what only its own programs need
EXCLUDED = ("winsockloop", "minicrypto", "mbedtls", "memory_log", "picoqmux")
PICOTLS = ("picotls", "pembase64", "hpke", "openssl", "asn1")
PACKAGE = Sdist("aiopquic", "0.6.1", "72579146e0f22859a5a7c197246604fef460b9e1b578a2910156dff7679efd29", isolated=True)


def sources(folder: Path) -> list[Path]:
    """Without picotls's fusion.c, which is for x86 only and needs flags of its own."""
    picoquic = sorted((folder / "picoquic/picoquic").glob("*.c"))
    chosen = [path for path in picoquic if not any(word in path.name for word in EXCLUDED)]
    return chosen + [folder / f"picotls/lib/{name}.c" for name in PICOTLS]


def main() -> None:
    into = Path(sys.argv[1]).resolve()
    with locked(cache_folder() / "lock"):
        for part in ("picotls", "picoquic"):
            marker = into / part / MARKER
            if not marker.exists() or marker.read_text() != PACKAGE.sha256:
                PACKAGE.unpack(f"third_party/{part}", into / part)
    print("\n".join(map(str, sources(into))))


if __name__ == "__main__":
    main()
