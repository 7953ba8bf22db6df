"""The catalog is whole, and agrees with itself."""

from __future__ import annotations

import re

from meshllm.models.catalog import CATALOG
from meshllm.models.names import base_of, quantisation_of


def test_every_name_means_one_model() -> None:
    names = [name.lower() for name in CATALOG.names]
    assert len(set(names)) == len(names) >= 20
    for entry in CATALOG.entries:
        assert all(CATALOG.find(name.upper() + ".gguf") is entry for name in (entry.name, *entry.short))
    assert CATALOG.find("no such model") is None


def test_every_entry_can_be_downloaded() -> None:
    for entry in CATALOG.entries:
        assert bool(entry.repository) != bool(entry.package) and entry.licence, entry.name
        assert bool(entry.files) != entry.unchecked, entry.name
        assert all(name.endswith(".gguf") for name in entry.files)
        assert len(entry.files) <= 1 or all(re.search(r"-\d{5}-of-\d{5}\.gguf$", name) for name in entry.files)
        assert entry.quantisation.lower() == quantisation_of(entry.name), entry.name
        assert entry.min_memory_bytes > entry.size_bytes > 0
    assert sum(entry.default for entry in CATALOG.entries) == 1


def test_models_of_2026_may_have_a_projector_or_predict_by_themselves() -> None:
    unchecked = [entry for entry in CATALOG.entries if entry.unchecked]
    assert len(unchecked) >= 25
    assert any(entry.projector for entry in unchecked) and any(entry.mtp for entry in unchecked)
    assert not any(entry.package for entry in unchecked)


def test_drafts_are_smaller_models_of_the_catalog() -> None:
    pairs = [(entry, CATALOG.draft_of(entry)) for entry in CATALOG.entries if entry.draft]
    assert pairs
    for entry, draft in pairs:
        assert draft and draft.drafts and draft.size_bytes < entry.size_bytes / 2, entry.name
        assert base_of(draft.name) != base_of(entry.name)
