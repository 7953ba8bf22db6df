"""llama.cpp's own test of architectures: tiny models of random weights, their logits over stages against the CPU's.

`scripts/archs` runs all of them; here are those whose graphs differ most from a plain decoder's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from support.archs import compare, two_stages

FAMILIES = {
    "decoders": "llama|qwen3moe|gemma3|gpt-oss|deepseek2",
    "recurrent": "mamba|mamba2",
    "hybrid": "qwen3next|qwen35|jamba|falcon-h1|lfm2moe|nemotron_h|kimi-linear|minimax-01|plamo2",
    "sparse attention": "deepseek32|deepseek4|glm-dsa",
    "layers that share": "gemma3n|bailingmoe3|t5",
    "diffusion": "llada|dream|hy_v4",
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with two_stages(tmp_path_factory.mktemp("archs")) as (environment, _):
        yield environment


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_compute_the_same_over_two_stages_and_the_host(stages: dict[str, str], family: str) -> None:
    result = compare(stages, f"^({FAMILIES[family]})$", ring=True, capture_output=True, timeout=250)
    output = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert result.returncode == 0, output + result.stderr[-4000:]
    wanted = FAMILIES[family].split("|")
    computed = [name for name in wanted if re.search(rf"\| *{re.escape(name)}\|.* OK ", output)]
    assert computed == wanted, output
