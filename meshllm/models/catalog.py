"""The models that have a short name: `catalog.toml`, read once."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Entry:
    """`repository` is the hub's; a model with a `package` comes from PyPI instead. `drafts`: is of use as a draft."""

    name: str
    short: tuple[str, ...]
    files: tuple[str, ...]
    size_bytes: int
    quantisation: str
    licence: str
    repository: str = ""
    package: str = ""
    draft: str = ""
    default: bool = False
    drafts: bool = False

    @property
    def min_memory_bytes(self) -> int:
        """Of all machines together: the size and a tenth."""
        return self.size_bytes + self.size_bytes // 10


def _entry(fields: dict[str, Any]) -> Entry:
    return Entry(**(fields | {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}))


class Catalog:
    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        content = tomllib.loads((files("meshllm") / "models" / "catalog.toml").read_text())
        return tuple(_entry(fields) for fields in content["model"])

    @property
    def names(self) -> list[str]:
        """All, the short ones too."""
        return [name for entry in self.entries for name in (entry.name, *entry.short)]

    @cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {name.lower(): entry for entry in self.entries for name in (entry.name, *entry.short)}

    def find(self, name: str) -> Entry | None:
        """By its name or a short one, in any case."""
        return self._by_name.get(name.strip().lower().removesuffix(".gguf"))

    def draft_of(self, entry: Entry) -> Entry | None:
        return self.find(entry.draft) if entry.draft else None


CATALOG = Catalog()
