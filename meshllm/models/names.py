"""Names of models as people write them. No I/O but the catalog's file, and nothing compiled: clients use it too."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from meshllm.models.catalog import CATALOG, Entry

_QUANTISATION = re.compile(r"[-_.:]((?:ud[-_])?(?:i?q\d\w*|bf16|f16|f32|mxfp4\w*))$")


def matching(wanted: str, names: Iterable[str]) -> list[str]:
    """The models of `names` that `wanted` may mean, best matches only.

    Case, quantisation, `.gguf`, a hub's `user/` and `-GGUF` may differ; short names of the catalog count too.
    """
    names = list(names)
    wanted_forms = {_canonical(wanted)}
    if entry := CATALOG.find(wanted):
        wanted_forms.add(_canonical(entry.name))
    exact = [name for name in names if _canonical(name) in wanted_forms]
    if exact:
        return exact
    return [name for name in names if (_canonical(name)[0], "") in wanted_forms]


def nearest(wanted: str, names: Iterable[str]) -> list[str]:
    """Names that `wanted` may misspell, best first."""
    by_plain = {_plain(name): name for name in names}
    return [by_plain[n] for n in difflib.get_close_matches(_plain(wanted), by_plain, n=3, cutoff=0.5)]


def is_projector(name: str) -> bool:
    """Whether the name of a file, or its path in a repository, is that of a projector (projectors.py)."""
    return "mmproj" in _plain(name)


def entry_of(name: str) -> Entry | None:
    """The catalog's entry for a model, whatever its quantisation."""
    base = base_of(name)
    return next((entry for entry in CATALOG.entries if base_of(entry.name) == base), None)


def base_of(name: str) -> str:
    """The name without its quantisation, in lower case."""
    return _canonical(name)[0]


def quantisation_of(name: str) -> str:
    """The quantisation in lower case; "" if the name has none."""
    return _canonical(name)[1]


def _canonical(name: str) -> tuple[str, str]:
    """(base, quantisation), comparable."""
    plain = _plain(name)
    match = _QUANTISATION.search(plain)
    base, quantisation = (plain[: match.start()], match[1]) if match else (plain, "")
    return re.sub(r"[-_]gguf$", "", base), quantisation


def _plain(name: str) -> str:
    return name.strip().lower().rpartition("/")[2].removesuffix(".gguf")
