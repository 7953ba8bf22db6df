"""Where a model is downloaded from. The hub answers from memory; tests/e2e/test_download.py goes through HTTP."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from meshllm.errors import ModelError
from meshllm.models.catalog import CATALOG
from meshllm.models.download import Source, can_be_had, find_source

Hub = Callable[..., None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Sets the files of every repository."""

    def holds(*names: str) -> None:
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
        api: Any = SimpleNamespace(model_info=lambda _repository: info)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)

    return holds


@pytest.mark.parametrize("name", CATALOG.names)
def test_every_name_of_the_catalog_has_a_source(name: str, hub: Hub) -> None:
    entry = CATALOG.find(name)
    assert entry and can_be_had(name)
    listed = entry.files or (f"as/they-call-it-{entry.quantisation}.gguf", "BF16/as-they-call-it-BF16.gguf")
    hub(*listed, "mmproj-F16.gguf")
    source = find_source(name)
    assert (source.name, source.repository, source.package) == (entry.name, entry.repository, entry.package)
    assert [remote for remote, _ in source.files] == list(entry.files or listed[:1])
    assert bool(source.projector) is entry.projector
    local = [local for _, local in source.files]
    assert len(set(local)) == len(local) and all(n.startswith(entry.name) and n.endswith(".gguf") for n in local)


def test_a_url_names_its_file() -> None:
    url = "https://example.org/a/Some-Model-Q4_0.gguf?download=true"
    assert find_source(url) == Source("Some-Model-Q4_0", url=url) and can_be_had(url)
    for other in ("https://example.org/model.bin", "https://example.org/", "https://example.org/.gguf"):
        with pytest.raises(ModelError, match=r"has to end in \.gguf"):
            find_source(other)


def test_the_usual_quantisation_unless_another_is_named(hub: Hub) -> None:
    hub("M-Q8_0.gguf", "M-Q4_K_M.gguf", "README.md")
    assert find_source("u/M-GGUF").files == (("M-Q4_K_M.gguf", "M-Q4_K_M.gguf"),)
    assert find_source("u/M-GGUF:q8_0") == Source("M-Q8_0", "u/M-GGUF", (("M-Q8_0.gguf", "M-Q8_0.gguf"),))
    with pytest.raises(ModelError, match=r"u/M-GGUF has no Q5_0; it has: Q4_K_M, Q8_0"):
        find_source("u/M-GGUF:Q5_0")


def test_the_parts_of_a_model_stay_together(hub: Hub) -> None:
    parts = [f"q4/M-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub(*parts, "M-Q8_0.gguf")
    source = find_source("u/M")
    assert source.name == "M-Q4_K_M" and [remote for remote, _ in source.files] == parts
    assert [local for _, local in source.files] == [f"M-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]


def test_a_repository_without_the_usual_quantisation_gives_its_first(hub: Hub) -> None:
    hub("plain.gguf")
    assert find_source("u/M").name == "plain"
    hub("config.json", "mmproj.gguf")
    with pytest.raises(ModelError, match="u/M has no GGUF file"):
        find_source("u/M")


def test_the_projector_comes_with_the_model(hub: Hub) -> None:
    hub("M-Q4_K_M.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf")
    assert find_source("u/M-GGUF").projector == ("mmproj-F16.gguf", "mmproj-M-F16.gguf")
    hub("q4/M-Q4_K_M-00001-of-00002.gguf", "q4/M-Q4_K_M-00002-of-00002.gguf", "mmproj-Another-Name-Q8_0.gguf")
    source = find_source("u/M-GGUF")
    assert source.projector == ("mmproj-Another-Name-Q8_0.gguf", "mmproj-M-Q8_0.gguf") and len(source.files) == 2
    hub("M-Q4_K_M.gguf")
    assert find_source("u/M-GGUF").projector is None


def test_a_repository_with_dynamic_quantisations_only(hub: Hub) -> None:
    hub("BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf", "M-UD-Q4_K_XL.gguf")
    assert find_source("u/M").name == "M-UD-Q4_K_XL"


def test_heads_that_guess_tokens_are_no_models(hub: Hub) -> None:
    hub("M-Q4_K_M.gguf", "mtp-M-Q4_K_M.gguf", "eagle3-M-Q4_K_M.gguf", "MTP/M-MTP-Q4_K_M.gguf", "M.imatrix.gguf")
    assert find_source("u/M-GGUF").files == (("M-Q4_K_M.gguf", "M-Q4_K_M.gguf"),)


def test_of_one_quantisation_under_two_names_one_is_taken(hub: Hub) -> None:
    hub("M-Q8_0-00001-of-00002.gguf", "M-Q8_0-00002-of-00002.gguf", "m-q8_0.gguf")
    assert [remote for remote, _ in find_source("u/M").files] == [f"M-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]


def test_what_names_nothing() -> None:
    with pytest.raises(ModelError, match=r"no model 'qwen2\.5-33b' in the catalog; did you mean"):
        find_source("qwen2.5-33b")
    assert not can_be_had("qwen2.5-33b") and can_be_had("user/repository:Q4_0")
