"""Model names as people write them."""

from __future__ import annotations

import pytest

from meshllm.models.names import matching


@pytest.mark.parametrize(
    ("wanted", "name", "fits"),
    [
        ("qwen2.5-7b-instruct", "Qwen2.5-7B-Instruct-Q4_K_M", True),
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "Qwen2.5-7B-Instruct-Q4_K_M", True),
        ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1", True),
        ("hermes", "Hermes-3-IQ2_M", False),
        ("Hermes-3", "Hermes-3-IQ2_M", True),
        ("Qwen2.5", "Qwen2.5-7B-Instruct-Q4_K_M", False),
    ],
)
def test_names_as_people_write_them(wanted: str, name: str, fits: bool) -> None:
    assert matching(wanted, [name]) == ([name] if fits else [])
