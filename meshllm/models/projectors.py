"""Projectors: the files beside a model that turn images and sounds into its embeddings ("mmproj", llama.cpp's mtmd).

Which file is whose follows from names alone. Opens no file and needs no compiled code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from meshllm.models.folders import PART
from meshllm.models.names import base_of, is_projector, quantisation_of

_MARK = re.compile(r"[-_.]?mmproj[-_.]?")
_OF_THE_FOLDER = ("", "model", "vision")  # what is left of mmproj-F16.gguf and mmproj-model-f16.gguf
_PREFERRED = ("f16", "bf16")  # as they are published for; an F32 is twice as large and no better


def best(projectors: Iterable[str]) -> str | None:
    """Of projectors of one model the one to use: F16, else BF16, else the first."""
    ranks = {name: quantisation_of(name) for name in sorted(projectors)}
    for wanted in _PREFERRED:
        if found := next((name for name, quantisation in ranks.items() if quantisation == wanted), None):
            return found
    return next(iter(ranks), None)


def projector_of(model: str, projectors: Iterable[str], alone: bool) -> str | None:
    """Which of these projectors belongs to the model `model`. `alone`: there is no other model beside it.

    One that bears the model's name, with or without what publishers put before it; or, if the model is alone, one
    that names no model at all.
    """
    base = base_of(model)
    subjects = {name: _subject(name) for name in projectors}
    matching = {name: subject for name, subject in subjects.items() if subject and _ends_in(base, subject)}
    if matching:
        longest = max(map(len, matching.values()))
        return best(name for name, subject in matching.items() if len(subject) == longest)
    return best(name for name, subject in subjects.items() if alone and subject in _OF_THE_FOLDER)


def file_name(model: str, quantisation: str = "") -> str:
    """What the projector of a model of that name is called beside it. Any name gives a plain file name."""
    stem = re.sub(r"[^\w.+-]", "_", model)
    if own := quantisation_of(stem):
        stem = stem[: -len(own) - 1]
    return f"mmproj-{stem}-{quantisation}.gguf" if quantisation else f"mmproj-{stem}.gguf"


def projector_beside(model_file: Path, model: str) -> Path | None:
    """The projector in the folder of the file, which belongs to the model `model`.

    Also in the folder above, where a repository has one folder for each quantisation.
    """
    folders = [model_file.parent]
    if quantisation_of(f"-{model_file.parent.name}"):
        folders.append(model_file.parent.parent)
    for folder in folders:
        names = [path.name for path in folder.glob("*.gguf")]
        others = {base_of(PART.sub("", Path(name).stem)) for name in names if not is_projector(name)}
        found = projector_of(model, filter(is_projector, names), alone=others <= {base_of(model)})
        if found:
            return folder / found
    return None


def _subject(projector: str) -> str:
    """The model that the file's name speaks of, in lower case."""
    return _MARK.sub("-", base_of(projector), count=1).strip("-")


def _ends_in(base: str, subject: str) -> bool:
    return base == subject or base.endswith(tuple(f"{separator}{subject}" for separator in "-_."))
