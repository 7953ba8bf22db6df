"""Nodes on one machine: invite tokens, a lite client beside a node, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import MESH_LLM, Api, MeshLlm, Process, eventually, free_port

from meshllm.mesh.token import decode


@pytest.fixture(scope="module")
def seed(model: Path) -> Iterator[MeshLlm]:
    with MeshLlm("--model", str(model), "--", "-c", "1024", "-t", "1") as node:
        yield node.ready()


def invite(seed: MeshLlm, *args: str) -> str:
    result = seed.command("token", *args)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def refused(*args: str) -> str:
    """The one line of a start that fails."""
    with tempfile.TemporaryDirectory() as data:
        argv = [MESH_LLM, "--port", str(free_port()), *args]
        env = os.environ | {"XDG_DATA_HOME": data}
        result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def rates_of_clients(seed: MeshLlm) -> list[float]:
    nodes = json.loads(seed.command("status", "--json").stdout)["nodes"]
    return [rate for node in nodes if node["role"] == "client" for rate in node["requests_per_min"].values()]


def test_client_beside_a_node_of_the_same_user(seed: MeshLlm) -> None:
    with MeshLlm("--client", "--join", invite(seed), data=seed.data) as client:
        client.ready()
        assert client.api.complete("Hi", 4)["tokens_predicted"] == 4
        assert client.api.request("/v1/models")["data"][0]["id"] == seed.api.request("/v1/models")["data"][0]["id"]
        status = seed.command("status").stdout
        assert re.search(r"client +alive", status) and "API client only" in status and "engine here: ready" in status
        rates = eventually(lambda: rates_of_clients(seed), 30, "the client's request, by gossip")
        assert [0.5 < rate < 2 for rate in rates] == [True]
    eventually(lambda: re.search(r"client +left", seed.command("status").stdout))


def test_client_runs_without_compiled_code(seed: MeshLlm, tmp_path: Path) -> None:
    """As where only the Python part is there: neither the extension nor the engine's code can be imported."""
    program = (
        "import sys; names = ('meshllm.rpc', 'meshllm.engine', 'meshllm.models.store');"
        "sys.modules.update(dict.fromkeys(names));"
        "from meshllm.cli.main import main; main(prog_name='mesh-llm')"
    )
    port = free_port()
    argv = [sys.executable, "-c", program, "--client", "--join", invite(seed), "--port", str(port)]
    with Process(argv, {"XDG_DATA_HOME": str(tmp_path)}) as client:
        client.wait_output("the API is at")
        assert Api(f"http://127.0.0.1:{port}").complete("Hi", 4)["tokens_predicted"] == 4


def test_second_worker_of_the_same_user_serves_too(seed: MeshLlm) -> None:
    """Its model fits on one machine: two independent servers in one mesh."""
    with MeshLlm("--join", invite(seed), "--", "-c", "512", "-t", "1", data=seed.data) as other:
        other.wait_output("ready: ")
        assert other.api.complete("Hi", 4)["tokens_predicted"] == 4
        assert other.api.engine_status()["stages"] == []


def test_a_node_that_cannot_run_the_model_leaves_it_to_others(seed: MeshLlm) -> None:
    """Nobody named it there: the node is still of use."""
    with MeshLlm("--join", invite(seed), "--", "--no-such-option", data=seed.data) as other:
        other.wait_output("this node will not serve")
        assert other.ready().api.complete("Hi", 4)["tokens_predicted"] == 4
    with MeshLlm("--join", invite(seed), "--model", "smollm2", "--", "--no-such-option", data=seed.data) as other:
        assert other.wait() == 2 and "cannot serve SmolLM2" in other.output().splitlines()[-1]


def test_tokens_end_and_are_revoked(seed: MeshLlm) -> None:
    good, taken_back = invite(seed, "--expires", "24h"), invite(seed)
    assert seed.command("token", "--revoke", taken_back).returncode == 0
    assert "the token was revoked; ask for a new one" in refused("--client", "--join", taken_back)
    with MeshLlm("--client", "--join", good) as client:
        client.ready()
    brief = invite(seed, "--expires", "1s")
    eventually(lambda: time.time() > decode(brief, 0).ticket.expires)
    assert "the token has expired" in refused("--client", "--join", brief)
    assert "expected a number followed by s, m, h or d" in seed.command("token", "--expires", "soon").stderr
    refused("--client", "--join", taken_back)
    assert seed.output().count(": the token was revoked") == 1  # logged once, however often


def test_bad_tokens(seed: MeshLlm) -> None:
    token = invite(seed)
    assert "cut off or damaged" in refused("--join", token[:-40])
    changed = token[:60] + ("A" if token[60] != "A" else "B") + token[61:]
    assert "copy the whole line again" in refused("--join", changed)
    assert "not a mesh-llm token" in refused("--join", "please")


def test_a_model_that_nobody_has(seed: MeshLlm) -> None:
    line = refused("--join", invite(seed), "--model", "Nonsense-1B")
    assert "there is no model 'Nonsense-1B'" in line and "no node of this mesh has it either" in line
    line = seed.command("drop", "Nonsense-1B").stderr
    assert "the model 'Nonsense-1B' is not served here; served: SmolLM2-135M-Instruct.Q4_1" in line


def test_mesh_that_does_not_answer(seed: MeshLlm, model: Path) -> None:
    with MeshLlm("--model", str(model)) as short:
        token = re.findall(r"--join (\S+)", short.wait_output("--join "))[-1]
    line = refused("--client", "--join", token)
    assert "cannot reach the mesh" in line and "127.0.0.1" in line and "does not answer" in line


def test_udp_port_in_use(model: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 0))
        port = str(taken.getsockname()[1])
        assert f"cannot use UDP port {port}: it is in use; choose another with --bind-port" in refused(
            "--model", str(model), "--bind-port", port
        )


def test_identity_in_use_or_broken(seed: MeshLlm, model: Path, tmp_path: Path) -> None:
    path = seed.data / "mesh-llm" / "identity.pem"
    assert "another mesh-llm is using the key file" in refused("--model", str(model), "--identity", str(path))
    broken = tmp_path / "key.pem"
    broken.write_text("no key")
    broken.chmod(0o600)
    assert "is not an Ed25519 key" in refused("--model", str(model), "--identity", str(broken))


def test_options_that_exclude_each_other(model: Path) -> None:
    assert "--client needs --join" in refused("--client")
    assert "works without a mesh" in refused("--stage", "127.0.0.1:1", "--split")
    assert "this machine has no device GPU9" in refused("--model", str(model), "--device", "GPU9")


def test_status_without_a_node() -> None:
    result = subprocess.run(
        [MESH_LLM, "status", "--port", str(free_port())], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "no mesh-llm of yours answers on port" in result.stderr
