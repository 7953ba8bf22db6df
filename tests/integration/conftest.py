"""Tiny models of kinds that no real model here has."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import archs

# a sliding window, experts, states beside attention and alone, latent attention
TINY = ("gemma3-dense", "gpt-oss-moe", "qwen35-dense", "falcon-h1-dense", "mamba2-dense", "deepseek2-moe")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return archs.tiny_models(tmp_path_factory.mktemp("tiny"), *TINY)
