"""The heads of a model's files at its source: names, shapes and types of all tensors, without the weights.

They are written as files of full size whose weights are a hole, so that whoever plans with a model need not know.
"""

from __future__ import annotations

import os
from pathlib import Path

from meshllm.errors import GgufError, ModelError
from meshllm.models.download import Source, hub_errors, urls_of
from meshllm.models.store import Model, load_model

_FIRST_BYTES, _MOST_BYTES = 1 << 20, 256 << 20  # a vocabulary of 250,000 tokens takes about 15 MB
_NO_GGUF = b"\xff" * 4096  # where a head ends too early, lengths are read that no file can have


def model_of_heads(source: Source, folder: Path) -> Model:
    """The model, with its files in `folder`, which are of no use but to plan. Raises ModelError or GgufError."""
    if source.package:
        raise ModelError(f"{source.name} comes from PyPI; download it to plan with it")
    urls = urls_of(source)
    paths = [folder / name for name in urls]
    have = dict.fromkeys(paths, 0)
    wanted = dict.fromkeys(paths, _FIRST_BYTES)
    while True:
        for url, path in zip(urls.values(), paths, strict=True):
            if have[path] < wanted[path]:
                have[path] = _get_head(url, path, wanted[path])
        try:
            return load_model(paths[-len(source.files)] if source.files else paths[0])
        except GgufError as error:
            short = [p for p in paths if have[p] == wanted[p] < _MOST_BYTES]
            if not short:
                raise
            named = [p for p in short if p.name in str(error)]
            for path in named or short:
                wanted[path] *= 2


def _get_head(url: str, path: Path, n_bytes: int) -> int:
    """Returns how many bytes were read: fewer than `n_bytes` for a smaller file."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session

    with hub_errors(url):
        about = get_hf_file_metadata(url)
        headers = build_hf_headers() if about.location == url else {}  # the token is for the hub only
        content = bytearray()
        with get_session().stream(
            "GET", about.location, headers=headers | {"Range": f"bytes=0-{n_bytes - 1}"}, follow_redirects=True
        ) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) >= n_bytes:  # from a server that knows no ranges
                    break
    head = bytes(content[:n_bytes])
    size = about.size or len(head)
    with path.open("wb") as file:
        file.write((head + _NO_GGUF)[:size])
        os.truncate(path, size)
    return len(head)
