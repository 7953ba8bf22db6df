"""The models with a short name, from `catalog.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from meshllm.mesh.groups import needed_bytes


@dataclass(frozen=True)
class Entry:
    """`repository` is on the hub; a model with a `package` comes from PyPI instead. `drafts`: it is a draft model.

    Without `files`, the hub's list tells those of the `quantisation`; it also tells the `projector`, if there is one.
    `mtp`: its last layers predict further tokens. `unchecked`: names and sizes were never compared with the hub.
    """

    name: str
    short: tuple[str, ...]
    size_bytes: int
    quantisation: str
    licence: str
    files: tuple[str, ...] = ()
    repository: str = ""
    projector: bool = False
    mtp: bool = False
    unchecked: bool = False
    package: str = ""
    draft: str = ""
    default: bool = False
    drafts: bool = False

    @property
    def min_memory_bytes(self) -> int:
        """What all machines together need to serve it."""
        return needed_bytes(self.size_bytes)


def _entry(fields: dict[str, Any]) -> Entry:
    return Entry(**(fields | {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}))


class Catalog:
    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        content = tomllib.loads((files("meshllm") / "models" / "catalog.toml").read_text())
        return tuple(_entry(fields) for fields in content["model"])

    @property
    def default(self) -> Entry:
        """What a node serves when its user names nothing and nothing is on disk."""
        return next(entry for entry in self.entries if entry.default)

    @property
    def names(self) -> list[str]:
        """All names, including short ones."""
        return [name for entry in self.entries for name in (entry.name, *entry.short)]

    @cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {name.lower(): entry for entry in self.entries for name in (entry.name, *entry.short)}

    def find(self, name: str) -> Entry | None:
        """By any of its names, in upper or lower case."""
        return self._by_name.get(name.strip().lower().removesuffix(".gguf"))

    def draft_of(self, entry: Entry) -> Entry | None:
        return self.find(entry.draft) if entry.draft else None


CATALOG = Catalog()
