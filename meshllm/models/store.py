"""The models on disk: in `~/.models`, the Hugging Face cache and the default model's package."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from meshllm import rpc
from meshllm.errors import GgufError, ModelError, NotOnDiskError
from meshllm.mesh.announcement import Capability
from meshllm.models.capability import capability_of, why_not_served
from meshllm.models.catalog import CATALOG
from meshllm.models.folders import PART, default_file, find_models
from meshllm.models.names import base_of, entry_of, matching, nearest
from meshllm.models.projectors import projector_beside
from meshllm.paths import models_folder

_log = logging.getLogger(__name__)

_PROJECTOR_ARCHITECTURE = "clip"  # whatever kind of encoder is in it


@dataclass(frozen=True)
class Projector:
    """The file that gives a model images or sounds. `fingerprint` in hexadecimal."""

    file: str
    size_bytes: int
    fingerprint: str

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size_bytes,)


@dataclass(frozen=True)
class Model:
    """A model on disk. `files` in order; `size_bytes` of all files; `n_layers` without the output layer. The last
    `n_nextn` of them are NextN blocks, which guess further tokens (multi-token prediction) and take no part otherwise.

    The projector is beside the model, not part of it: the fingerprint is that of `files`, since a stage computes the
    same with and without a projector. Only the host of a group reads it.
    """

    name: str
    files: tuple[str, ...]
    size_bytes: int
    architecture: str
    n_layers: int
    info: rpc.GgufInfo
    projector: Projector | None = None
    n_nextn: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """In bytes, of each file."""
        return tuple(self.info.sizes)

    @property
    def n_trunk(self) -> int:
        """The layers that every token passes; NextN blocks stay on the host, so there are no more stages than these."""
        return self.n_layers - self.n_nextn

    @property
    def n_ctx_train(self) -> int:
        """The longest context that the model was trained for; 0 if its file does not say."""
        value = self.info.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) else 0

    @cached_property
    def capability(self) -> Capability:
        names = {tensor.name for tensor in self.info.tensors}
        return capability_of(self.architecture, self.info.metadata, names)

    def fingerprint(self) -> bytes:
        return rpc.fingerprint(self.files)


def resolve(wanted: str | None) -> Model:
    """The model that `wanted` names: a path, or a name as names.matching() takes it.

    None takes the only model on disk, or the default model. Raises GgufError or ModelError; NotOnDiskError for a name
    that fits nothing on disk.
    """
    if wanted is None:
        return load_model(_unnamed())
    if is_path(wanted):
        return load_model(Path(wanted).expanduser())
    known = find_models()
    chosen = matching(wanted, known)
    if len(chosen) > 1:
        raise ModelError(f"'{wanted}' matches several models: {', '.join(sorted(chosen))}; give the full name")
    if not chosen:
        near = nearest(wanted, [*known, *CATALOG.names])
        advice = f"did you mean {', '.join(near)}?" if near else "mesh-llm download lists models to download"
        raise NotOnDiskError(f"there is no model '{wanted}' in {models_folder()}; {advice}")
    return load_model(known[chosen[0]])


def is_path(wanted: str) -> bool:
    """Whether it is a path rather than a name; `user/repository` is a name unless such a file exists."""
    path = Path(wanted).expanduser()
    return (
        path.exists()
        or path.is_absolute()
        or wanted.startswith(".")
        or (wanted.endswith(".gguf") and os.sep in wanted and "://" not in wanted)
    )


def load_model(path: Path) -> Model:
    """Reads the indices of the model that `path`, one of its files, belongs to, and of its projector.

    Raises GgufError.
    """
    files = rpc.split_parts(str(path))
    info = rpc.read_gguf(files)
    architecture = info.metadata.get("general.architecture")
    if architecture == _PROJECTOR_ARCHITECTURE:
        raise GgufError(f"{path} is only the projector of a model; name the model that it belongs to")
    n_layers = info.metadata.get(f"{architecture}.block_count")
    n_nextn = info.metadata.get(f"{architecture}.nextn_predict_layers", 0)
    if not isinstance(architecture, str) or not isinstance(n_layers, int) or n_layers < 1:
        raise GgufError(f"{path} is a GGUF file but not a language model: it has no number of layers")
    if not isinstance(n_nextn, int) or not 0 <= n_nextn <= n_layers:
        raise GgufError(f"{path} has {n_layers} layers, and {n_nextn} of them would predict further tokens")
    if reason := why_not_served(architecture):
        raise GgufError(f"{path} {reason}")
    name = PART.sub("", Path(files[0]).stem)
    projector = _load_projector(projector_beside(Path(files[0]), name))
    return Model(name, tuple(files), sum(info.sizes), architecture, n_layers, info, projector, n_nextn)


def _load_projector(path: Path | None) -> Projector | None:
    """None for a file that is broken or something else: the model can be served without it."""
    if path is None:
        return None
    try:
        info = rpc.read_gguf([str(path)])
        if info.metadata.get("general.architecture") == _PROJECTOR_ARCHITECTURE:
            return Projector(str(path), sum(info.sizes), rpc.fingerprint([str(path)]).hex())
        _log.warning("%s is not a projector, whatever its name says, and is ignored", path)
    except GgufError as error:
        _log.warning("the projector is ignored: %s", error)
    return None


def draft_on_disk(model: Model) -> Model | None:
    """The draft model that the catalog pairs with this one, if it is on disk."""
    entry = entry_of(model.name)
    draft = CATALOG.draft_of(entry) if entry else None
    known = find_models()
    for name in matching(base_of(draft.name), known) if draft else ():
        with contextlib.suppress(GgufError):
            return load_model(known[name])
    return None


@dataclass(frozen=True)
class _Read:
    """The result of reading a file; `model` is None if it is broken. `signature`: _signature() at that time."""

    signature: tuple[object, ...]
    model: Model | None = None
    fingerprint: str = ""


class Store:
    """Every model on disk by fingerprint, brought up to date by `scan`. `emit` gets one line for each broken file.

    Without `projectors` no model has one.
    """

    def __init__(self, emit: Callable[[str], None], projectors: bool = True) -> None:
        self._emit, self.takes_projectors = emit, projectors
        self._read: dict[Path, _Read] = {}
        self._extra: dict[str, Model] = {}
        self._left_out: set[str] = set()
        self.models: dict[str, Model] = {}  # fingerprint in hexadecimal

    def add(self, model: Model) -> None:
        """Adds a model that lies outside the folders."""
        fingerprint = model.fingerprint().hex()
        self._extra[fingerprint] = self.models[fingerprint] = self._as_served(model)

    def _as_served(self, model: Model) -> Model:
        return model if self.takes_projectors else replace(model, projector=None)

    @property
    def shared(self) -> dict[str, Model | Projector]:
        """The models and their projectors, which peers fetch each by its own fingerprint."""
        projectors = {m.projector.fingerprint: m.projector for m in self.models.values() if m.projector}
        return {**projectors, **self.models}

    def exclude(self, fingerprint: str) -> None:
        """Leaves the model out from now on."""
        self._left_out.add(fingerprint)
        self.models = {f: model for f, model in self.models.items() if f != fingerprint}

    def scan(self) -> bool:
        """Rescans the folders. Returns whether anything has changed. Files still being written count once complete."""
        self._read = {path: read for path in find_models().values() if (read := self._look(path))}
        whole = [(read.fingerprint, read.model) for read in self._read.values() if read.model]
        found = dict(sorted(whole, key=lambda each: each[1].projector is not None))  # of two copies, one that has one
        again = {(fingerprint, model.files): model for fingerprint, model in whole}
        extra = {f: again.get((f, model.files), model) for f, model in self._extra.items()}
        found = {f: model for f, model in (found | extra).items() if f not in self._left_out}
        changed = _projectors(found) != _projectors(self.models)
        self.models = found
        return changed

    def _look(self, path: Path) -> _Read | None:
        try:
            signature = _signature(path)
        except OSError:
            return None
        known = self._read.get(path)
        if known and known.signature == signature:
            return known
        try:
            model = self._as_served(load_model(path))
            return _Read(signature, model, model.fingerprint().hex())
        except GgufError as error:
            self._emit(f"skipped a model file: {error}")
            return _Read(signature)


def _projectors(models: Mapping[str, Model]) -> dict[str, Projector | None]:
    return {fingerprint: model.projector for fingerprint, model in models.items()}


def _signature(path: Path) -> tuple[object, ...]:
    """Changes when the model's file or its projector does. Raises OSError."""
    files = [path, *filter(None, [projector_beside(path, PART.sub("", path.stem))])]
    return tuple((file, s.st_size, s.st_mtime_ns, s.st_ino) for file in files for s in [file.stat()])


def _unnamed() -> Path:
    known = find_models()
    default = default_file()
    drafts = {entry.name for entry in CATALOG.entries if entry.drafts}
    own = {name: path for name, path in known.items() if path != default and not matching(name, drafts)}
    if len(own) > 1:
        raise ModelError(f"several models are on disk; choose one with --model: {', '.join(own)}")
    if own:
        return next(iter(own.values()))
    if default:
        return default
    raise ModelError(
        f"no model is named and there is none in {models_folder()}; name one with --model NAME_OR_PATH, "
        f"or get the small default model with: mesh-llm download {CATALOG.default.short[0]}"
    )
