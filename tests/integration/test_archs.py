"""llama.cpp's own test of architectures: tiny models of random weights, their logits over stages against the CPU's.

`scripts/archs` runs all of them; here are those whose graphs differ most from a plain decoder's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support.processes import ENGINE, backend_environment

from meshllm import rpc

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
    """The environment of a host with two stages."""
    with ExitStack() as stack:
        servers = []
        for _ in range(2):
            servers.append(rpc.DeviceServer("127.0.0.1:0", threads=1))
            stack.callback(servers[-1].stop)
        config = tmp_path_factory.mktemp("archs") / "backend.json"
        stages = [{"name": f"s{i}", "address": s.address, "peer_address": s.address} for i, s in enumerate(servers)]
        config.write_text(json.dumps({"stages": stages, "host_device": "CPU"}))
        yield backend_environment(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_compute_the_same_over_two_stages_and_the_host(stages: dict[str, str], family: str) -> None:
    command = [str(ENGINE / "test-archs"), "-b", "STAGE0", "-s", "1", "-a", f"^({FAMILIES[family]})$"]
    environment = os.environ | stages | {"MESH_LLM_RING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    output = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert result.returncode == 0, output + result.stderr[-4000:]
    wanted = FAMILIES[family].split("|")
    computed = [name for name in wanted if re.search(rf"\| *{re.escape(name)}\|.* OK ", output)]
    assert computed == wanted, output
