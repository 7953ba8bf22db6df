"""Brings llama.cpp: fetches its source, builds it, and prints the folder of programs and libraries as its last line.

The source is what the PyPI package `llama-cpp-python` carries, pinned by version and SHA-256. A checkout that is
already at --source is used as it is. Builds are cached under the user's cache folder by everything that matters to
the result; ccache is used where it is present.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from packages import MARKER, Sdist, cache_folder, locked, say, screen
from progress import Progress

PACKAGE = Sdist("llama-cpp-python", "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
TARGETS = ["llama-server", "ggml-rpc-server", "test-backend-ops"]
# No OpenMP: ggml's own threads are portable, and how long they spin between graphs can be set.
# No versioned sonames: a wheel holds no symbolic links, each library would be in it three times.
FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_RPC": "ON",
    "GGML_OPENMP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_TESTS": "ON",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}


def ensure_source(source: Path) -> str:
    """Puts the source at `source` unless something is there; returns what identifies it."""
    marker = source / MARKER
    if (source / "CMakeLists.txt").exists():
        if marker.exists():
            return marker.read_text()
        head = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True)
        return f"{source} {head.stdout.strip()} {(source / 'CMakeLists.txt').stat().st_mtime_ns}"
    PACKAGE.unpack("vendor/llama.cpp", source)
    return PACKAGE.sha256


def processor() -> str:
    """What GGML_NATIVE compiles for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()


def build_key(source_id: str, flags: dict[str, str], cc: str, cxx: str) -> str:
    parts = [source_id, *(f"{k}={v}" for k, v in sorted(flags.items())), *TARGETS, platform.machine()]
    for compiler in (cc, cxx):
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        parts.append(version.partition(" ")[2])  # without the name it was called by: cc and gcc are one
    if flags.get("GGML_NATIVE", "ON") != "OFF":
        parts.append(processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def run_logged(command: list[str], log: Path, on_line: Callable[[str], None] = lambda _: None) -> None:
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] "}  # as progress.parse reads it, whatever the user prefers
    with (
        log.open("a") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            file.write(line)
            on_line(line)
    if process.returncode != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-60:]), file=sys.stderr)
        raise SystemExit(f"building llama.cpp failed; the whole log is in {log}")


def build(source: Path, cmake: str, cc: str, cxx: str, flags: dict[str, str], into: Path) -> None:
    """Builds in a scratch folder and moves the programs and libraries to `into` when all are there."""
    scratch = into.parent / f"{into.name}.building"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    log = into.parent / f"{into.name}.log"
    log.unlink(missing_ok=True)
    configure = [cmake, "-S", str(source), "-B", str(scratch)]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    configure += [f"-DCMAKE_C_COMPILER={cc}", f"-DCMAKE_CXX_COMPILER={cxx}"]
    configure += [f"-D{key}={value}" for key, value in flags.items()]
    if shutil.which("ccache"):
        configure += ["-DCMAKE_C_COMPILER_LAUNCHER=ccache", "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"]
    say(f"building llama.cpp, once: 8 to 10 minutes on 2 cores; log in {log}")
    run_logged(configure, log)
    progress = Progress("llama.cpp", screen())
    jobs = str(os.cpu_count() or 1)
    run_logged([cmake, "--build", str(scratch), "--parallel", jobs, "--target", *TARGETS], log, progress.feed)
    progress.done()
    finished = scratch / "engine"
    finished.mkdir()
    for file in (scratch / "bin").iterdir():
        if file.name in TARGETS or file.suffix in (".so", ".dylib", ".metal"):
            shutil.copy2(file, finished / file.name)
    os.replace(finished, into)
    shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--cmake", required=True)
    parser.add_argument("--cc", required=True)
    parser.add_argument("--cxx", required=True)
    parser.add_argument("--define", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    args.source = args.source.resolve()
    flags = FLAGS | dict(define.split("=", 1) for define in args.define)
    with locked(cache_folder() / "lock"):
        source_id = ensure_source(args.source)
        engine = cache_folder() / "llama.cpp" / build_key(source_id, flags, args.cc, args.cxx)
        if not engine.exists():
            build(args.source, args.cmake, args.cc, args.cxx, flags, engine)
    print(engine)


if __name__ == "__main__":
    main()
