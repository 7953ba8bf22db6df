"""llama.cpp's own test of architectures: tiny models of random weights, their logits over stages against the CPU's.

`scripts/archs` runs all of them; here are those whose graphs differ most from a plain decoder's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.archs import ONCE_CRASHED, compare, left_to_the_host, passed, two_stages

from meshllm import rpc

FAMILIES = {
    "decoders": "llama|qwen3moe|gemma3|gpt-oss|deepseek2",
    "recurrent": "mamba|mamba2",
    "hybrid": "qwen3next|qwen35|jamba|falcon-h1|lfm2moe|nemotron_h|kimi-linear|minimax-01|plamo2",
    "sparse attention": "deepseek32|deepseek4|glm-dsa",
    "layers that share": "gemma3n|bailingmoe3|t5",
    "diffusion": "llada|dream|hy_v4",
    "indices that were floats, pooling": "minimax-m3|glm5-next",
    "parts without elements": "minicpm3",
}


OTHERS = ["bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3"]
OTHERS += ["eurobert", "gemma-embedding", "llama-embed", "t5encoder", "gemma4", "rwkv6", "rwkv7", "arwkv7"]
SPLIT_TENSORS = ["llama", "qwen", "qwen3moe", "gemma3", "gpt-oss", "qwen35", "qwen3next", "lfm2", "llada", "deepseek4"]

Stages = tuple[dict[str, str], list[rpc.DeviceServer]]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    with two_stages(tmp_path_factory.mktemp("archs")) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_compute_the_same_over_two_stages_and_the_host(stages: Stages, family: str) -> None:
    check(stages, FAMILIES[family].split("|"), "-b", "STAGE0", ring=True)


def test_embedding_models_and_others_compute_the_same_over_two_stages_and_the_host(stages: Stages) -> None:
    """Those that llama.cpp's test leaves out."""
    check(stages, OTHERS, "--others", ring=True)


def test_tensors_are_split_over_two_stages(stages: Stages) -> None:
    """Each tensor lies in part on either stage, as with -sm tensor; "Meta" is llama.cpp's name for that."""
    check(stages, SPLIT_TENSORS, ring=False, device="Meta")


@pytest.mark.parametrize("seed", [2, 3])
def test_what_has_crashed_before(stages: Stages, seed: int) -> None:
    """`scripts/archs` has 20 seeds."""
    environment, _ = stages
    for arguments in ONCE_CRASHED:
        result = compare(environment, *arguments, ring=True, seed=seed, capture_output=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]


def check(stages: Stages, wanted: list[str], *arguments: str, ring: bool, device: str = "") -> None:
    environment, servers = stages
    before = [server.counters()["graphs_computed"] for server in servers]
    regex = f"^({'|'.join(wanted)})$"
    result = compare(environment, *arguments, "-a", regex, ring=ring, capture_output=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert sorted(passed(result.stdout, device)) == sorted(wanted), result.stdout
    assert left_to_the_host(result.stdout + result.stderr) == []
    assert all(server.counters()["graphs_computed"] > n for server, n in zip(servers, before, strict=True))
