"""What goes with a model, over two stages as on one machine: images, LoRA, control vectors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import adapters
from support.cut import rewrite
from support.processes import ENGINE, Api, DeviceServer, MeshLlm, Process, eventually, free_port
from support.world import world

N_EMBD, N_LAYERS = 576, 30  # of SmolLM2
GEMMA_N_EMBD = 640  # of Gemma 3 270M
# What rounds differently and is not so with stages: repacked weights, and a prompt cut into parts by checkpoints.
ENGINE_ARGS = ("-c", "1024", "-t", "1", "--no-repack", "--ctx-checkpoints", "0")
RED, BLUE = (255, 0, 0), (0, 0, 255)


@contextmanager
def plain(model: Path, *args: str) -> Iterator[Api]:
    """llama-server, with no line of ours in between."""
    port = free_port()
    argv = [str(ENGINE / "llama-server"), "-m", str(model), "--port", str(port), *ENGINE_ARGS, *args]
    with Process(argv):
        api = Api(f"http://127.0.0.1:{port}")
        eventually(api.healthy, 60, "plain llama-server")
        yield api


@contextmanager
def over_two_stages(model: Path, *args: str) -> Iterator[MeshLlm]:
    with ExitStack() as stack:
        stages = [stack.enter_context(DeviceServer("127.0.0.1:0", "--model", str(model), threads=1)) for _ in range(2)]
        where = [arg for stage in stages for arg in ("--stage", stage.ready().address)]
        log = ("--engine-log", os.environ["MESH_LLM_MODELS"] + "/engine.log")
        node = MeshLlm("--model", str(model), *where, *log, "--", *ENGINE_ARGS, *args)
        yield stack.enter_context(node).ready()


def about(colour: tuple[int, int, int]) -> dict[str, Any]:
    """A request with an image, answered greedily."""
    image = {"type": "image_url", "image_url": {"url": adapters.picture(*colour)}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "Describe it."}]}]
    return {"messages": messages, "max_tokens": 24, "temperature": 0, "cache_prompt": False, "logprobs": True}


def describe(api: Api, colour: tuple[int, int, int]) -> Any:
    """What the model says to an image, how many tokens it read, and how sure it was of each that it wrote."""
    answer = api.request("/v1/chat/completions", about(colour))
    choice = answer["choices"][0]
    sure = [token["logprob"] for token in choice["logprobs"]["content"]]
    return choice["message"]["content"], answer["usage"]["prompt_tokens"], sure


def counted(node: MeshLlm, name: str) -> int:
    return sum(stage["counters"][name] for stage in node.api.engine_status()["stages"])


def continued(api: Api) -> Any:
    return api.complete("The history of Rome begins", 30)["content"]


@pytest.mark.parametrize("kind", ["mlp", "gemma3"])
def test_images_over_two_stages(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """The projector lies beside the model, and so is found, and stays on the host. Gemma reads images non-causally."""
    model: Path = request.getfixturevalue("other_model" if kind == "gemma3" else "model")
    seeing = tmp_path / "Seeing-Q4_1.gguf"
    seeing.symlink_to(model)
    n_embd = GEMMA_N_EMBD if kind == "gemma3" else N_EMBD
    projector = adapters.projector(tmp_path / "mmproj-F16.gguf", n_embd, kind)
    with plain(model, "--mmproj", str(projector)) as api:
        expected = [describe(api, colour) for colour in (RED, BLUE)]
    assert expected[0] != expected[1]
    with over_two_stages(seeing) as node:
        for colour, what in zip((RED, BLUE), expected, strict=True):
            assert describe(node.api, colour) == what
        log = (Path(os.environ["MESH_LLM_MODELS"]) / "engine.log").read_text()
        assert "CLIP using HOST backend" in log
        assert counted(node, "weight_bytes_sent") == 0
        assert node.api.request("/v1/models")["data"][0]["capabilities"] == ["completion", "multimodal"]
    with over_two_stages(seeing, "--no-mmproj") as node:
        status, answer = node.api.status_of("/v1/chat/completions", about(RED))
        assert status >= 400 and "image" in answer["error"]["message"]
        assert node.api.request("/v1/models")["data"][0]["capabilities"] == ["completion"]


def test_a_projector_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    seeing = tmp_path / "Seeing-Q4_1.gguf"
    seeing.symlink_to(model)
    adapters.projector(tmp_path / "mmproj-F16.gguf", N_EMBD // 2)
    with MeshLlm("--model", str(seeing), "--", *ENGINE_ARGS) as node:
        assert node.wait() == 2
        last = node.output().splitlines()[-1]
        assert "mismatch" in last and last.endswith("; -- --no-mmproj leaves its projector out")


@pytest.mark.parametrize("kind", ["lora", "control-vector"])
def test_adapters_over_two_stages(model: Path, tmp_path: Path, kind: str) -> None:
    """They change the answer as they do on one machine, and none of their weights is taken from the model's file."""
    file = tmp_path / "adapter.gguf"
    if kind == "lora":
        adapters.lora(file, model)
    else:
        adapters.control_vector(file, N_EMBD, N_LAYERS)
    with plain(model) as api:
        unchanged = continued(api)
    with plain(model, f"--{kind}", str(file)) as api:
        expected = continued(api)
    assert expected != unchanged
    with over_two_stages(model, f"--{kind}", str(file)) as node:
        assert continued(node.api) == expected
        in_layers = sum(stage["weight_bytes"] for stage in node.api.engine_status()["stages"])
        assert counted(node, "weight_bytes_local") == in_layers  # the model's own, and nothing else


@pytest.mark.timeout(300)
def test_a_peer_fetches_the_projector_with_the_model(model: Path, tmp_path: Path) -> None:
    """And serves images when the node that had it is gone."""
    with world(tmp_path, hosts=2, rtt_ms=1) as mesh:
        folders = {host: tmp_path / f"models-{host}" for host in ("h1", "h2")}
        for path in folders.values():
            path.mkdir()
        rewrite(model, folders["h1"] / "Seeing-Q4_1.gguf", layers=range(20))
        projector = adapters.projector(folders["h1"] / "mmproj-F16.gguf", N_EMBD)
        args: dict[str, Any] = {"engine_args": ("--", *ENGINE_ARGS)}
        env = {host: {"MESH_LLM_MODELS": str(path)} for host, path in folders.items()}
        token = mesh.seed("h1", "--model", "seeing", **args, env=env["h1"])
        mesh.nodes["h1"].ready()
        expected = describe(mesh.api("h1"), RED)
        second = mesh.start("h2", "--join", token, **args, env=env["h2"])
        second.wait_output("Seeing-Q4_1 has arrived on this machine")
        assert (folders["h2"] / "mmproj-Seeing.gguf").read_bytes() == projector.read_bytes()
        eventually(lambda: mesh.api("h2").engine_status(), 60, "the second has an engine")
        mesh.stop("h1", signal.SIGKILL)
        assert describe(mesh.api("h2"), RED) == expected


@pytest.mark.timeout(120)
def test_a_peer_fetches_a_projector_that_came_later(model: Path, tmp_path: Path) -> None:
    with world(tmp_path, hosts=2, rtt_ms=1) as mesh:
        folders = {host: tmp_path / f"models-{host}" for host in ("h1", "h2")}
        for path in folders.values():
            path.mkdir()
            rewrite(model, path / "Seeing-Q4_1.gguf", layers=range(20))
        args: dict[str, Any] = {"engine_args": ("--", *ENGINE_ARGS)}
        env = {host: {"MESH_LLM_MODELS": str(path)} for host, path in folders.items()}
        token = mesh.seed("h1", "--model", "seeing", **args, env=env["h1"])
        second = mesh.start("h2", "--join", token, **args, env=env["h2"])
        second.ready()
        projector = adapters.projector(folders["h1"] / "mmproj-F16.gguf", N_EMBD)
        second.wait_output("the projector of Seeing-Q4_1 has arrived on this machine", 60)  # both look every 10 s
        assert (folders["h2"] / "mmproj-Seeing.gguf").read_bytes() == projector.read_bytes()


def test_another_models_weights_of_the_same_name_are_its_own(model: Path, tmp_path: Path) -> None:
    """A draft on a stage, which has the model: the names of its last layers are those of other layers there."""
    draft = rewrite(model, tmp_path / "draft-Q4_1.gguf", [i for i in range(N_LAYERS) if i not in (25, 26)])[0]
    accepted = []
    for device in ("HOST", "STAGE0"):
        speculation = ("--spec-type", "draft-simple", "--spec-draft-model", str(draft), "--spec-draft-device", device)
        with over_two_stages(model, *speculation) as node:
            answer = node.api.complete("def add(a, b):\n    return a + b\n\ndef sub(a, b):\n", 40)
            accepted.append((answer["content"], answer["timings"]["draft_n"], answer["timings"]["draft_n_accepted"]))
            sent = counted(node, "weight_bytes_sent")
    assert accepted[0] == accepted[1] and accepted[0][2] > 0
    assert sent > 0  # the layers that have moved
