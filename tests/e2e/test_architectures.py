"""Models of random weights in a real mesh, split over two nodes: tokens and log-probabilities as of plain llama-server.

One of each kind, written by llama.cpp's own test of architectures. What is not split: tests/integration/test_archs.py
has every architecture.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import adapters
from support.cut import rewrite
from support.processes import ENGINE, Api, Process, eventually, free_port
from support.world import World, world

from meshllm.models.capability import Pooling

ENGINE_ARGS = ("-c", "512", "-t", "1", "-np", "1", "--ctx-checkpoints", "0", "--no-repack")
N_EMBD = 256  # of the models with images
PROMPTS = ([5, 9, 17, 33, 65, 9, 17], [100, 3, 77])
TEXTS = ["Rome was not built in a day", "hello", "the sun is hot"]


def write(folder: Path, name: str, *kind: str) -> Path:
    """NAME.gguf of NAME-dense.gguf and the like."""
    architecture = name.rsplit("-", 1)[0] if not kind else name
    subprocess.run(
        [ENGINE / "test-archs", *kind, "-o", folder, "-s", "1", "-a", f"^{architecture}$"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return folder / f"{name}.gguf"


def grouped_experts(folder: Path) -> Path:
    """Field report 7: experts are chosen within groups, for which masks are filled."""
    sizes = {"expert_count": 4, "expert_used_count": 2, "expert_group_count": 2, "expert_group_used_count": 1}

    def twice_as_many(name: str, data: Any) -> Any:
        per_expert = "_exps." in name or "ffn_gate_inp." in name or "exp_probs" in name
        return np.concatenate([data, np.flip(data, -1)]) if per_expert else data

    numbers = {f"deepseek2.{key}": value for key, value in sizes.items()}
    source = write(folder, "deepseek2-moe")
    return rewrite(source, folder / "grouped.gguf", numbers=numbers, change=twice_as_many)[0]


def seeing(folder: Path) -> Path:
    model = write(folder, "gemma3-dense").rename(folder / "seeing.gguf")
    adapters.projector(folder / "mmproj-seeing.gguf", N_EMBD, "gemma3")
    return model


def ranking(folder: Path) -> Path:
    source = write(folder, "modern-bert", "--others")
    return rewrite(source, folder / "ranking.gguf", numbers={"modern-bert.pooling_type": Pooling.RANK})[0]


def completions(api: Api) -> Any:
    """The tokens, and how likely they and their rivals were."""
    found = []
    for prompt in PROMPTS:
        answer = api.complete(prompt, 24, n_probs=3, return_tokens=True)
        likeliest = [token["top_logprobs"] for token in answer["completion_probabilities"]]
        found.append((answer["tokens"], [rival["logprob"] for each in likeliest for rival in each]))
    return found


def descriptions(api: Api) -> Any:
    found = []
    for colour in ((255, 0, 0), (0, 0, 255)):
        image = {"type": "image_url", "image_url": {"url": adapters.picture(*colour)}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
        body = {"messages": messages, "max_tokens": 24, "temperature": 0, "logprobs": True, "cache_prompt": False}
        choice = api.request("/v1/chat/completions", body)["choices"][0]
        found.append((choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]))
    return found


def embeddings(api: Api) -> Any:
    return [("", each["embedding"]) for each in api.request("/v1/embeddings", {"input": TEXTS})["data"]]


def ranks(api: Api) -> Any:
    results = api.request("/v1/rerank", {"query": TEXTS[0], "documents": TEXTS})["results"]
    return [("", [each["relevance_score"]]) for each in sorted(results, key=lambda each: each["index"])]


@dataclass(frozen=True)
class Kind:
    make: Callable[[Path], Path]
    ask: Callable[[Api], Any] = completions
    plain_args: tuple[str, ...] = field(default=())  # what mesh-llm finds out by itself


KINDS = {
    "hybrid": Kind(lambda folder: write(folder, "qwen35-dense")),
    "grouped experts": Kind(grouped_experts),
    "sliding window": Kind(lambda folder: write(folder, "gemma3-dense")),
    "sparse attention": Kind(lambda folder: write(folder, "deepseek32-moe")),
    "vision": Kind(seeing, descriptions, ("--mmproj", "mmproj-seeing.gguf")),
    "embedding": Kind(lambda folder: write(folder, "nomic-bert-moe", "--others"), embeddings, ("--embedding",)),
    "rerank": Kind(ranking, ranks, ("--rerank",)),
}


def plain(model: Path, kind: Kind) -> Any:
    """What llama-server answers, with no line of ours in between."""
    port = free_port()
    argv = [str(ENGINE / "llama-server"), "-m", str(model), "--port", str(port), *ENGINE_ARGS]
    with Process([*argv, *(str(model.parent / arg) if arg.endswith(".gguf") else arg for arg in kind.plain_args)]):
        api = Api(f"http://127.0.0.1:{port}")
        eventually(api.healthy, 60, "plain llama-server")
        return kind.ask(api)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("lab"), hosts=2, rtt_ms=2) as made:
        yield made


@contextmanager
def split_over_two(mesh: World, model: Path) -> Iterator[World]:
    """Both nodes have the file."""
    engine_args = ("--", *ENGINE_ARGS)
    token = mesh.seed("h1", "--model", str(model), "--split", engine_args=engine_args)
    mesh.start("h2", "--join", token, "--model", str(model), engine_args=engine_args)
    try:
        eventually(lambda: mesh.served_by("h1", "h1", "h2"), 60, "served by both")
        yield mesh
    finally:
        for host in ("h1", "h2"):
            mesh.stop(host, signal.SIGTERM)


def stages_of(mesh: World) -> Any:
    return next(engine["stages"] for host in ("h1", "h2") if (engine := mesh.status(host)["engine"]))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", KINDS)
def test_split_over_two_nodes(lab: World, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    model = kind.make(tmp_path)
    expected = plain(model, kind)
    assert all(expected[0] != each for each in expected[1:])
    with split_over_two(lab, model) as mesh:
        answers = kind.ask(mesh.api("h2"))
        stages = stages_of(mesh)
        if kind.ask is completions:
            mesh.api("h1").complete(PROMPTS[0], 60)
            waits = stages_of(mesh)[0]["counters"]["blocking_waits"] - stages[0]["counters"]["blocking_waits"]
            assert 60 <= waits < 60 + 10  # one a token: no operator goes back to the host
    assert [text for text, _ in answers] == [text for text, _ in expected]
    for (_, numbers), (_, wanted) in zip(answers, expected, strict=True):
        assert numbers == pytest.approx(wanted, abs=1e-5)
    assert [stage["n_layers"] > 0 and stage["counters"]["weight_bytes_local"] > 0 for stage in stages] == [True]
    assert stages[0]["counters"]["weight_bytes_sent"] == 0


@pytest.mark.timeout(120)
def test_embeddings_find_the_model_that_makes_them(lab: World, tmp_path: Path) -> None:
    """A chat model on one node and an embedding model on the other; requests that name neither."""
    chats, embeds = write(tmp_path, "llama-dense"), write(tmp_path, "nomic-bert", "--others")
    engine_args = ("--", *ENGINE_ARGS)
    token = lab.seed("h1", "--model", str(chats), engine_args=engine_args)
    lab.start("h2", "--join", token, "--model", str(embeds), engine_args=engine_args)
    try:
        eventually(lambda: len(lab.status("h1")["served"]) == 2, 60, "both are served")
        listed = lab.api("h1").request("/v1/models")["data"]
        assert {model["id"]: model["capabilities"] for model in listed} == {
            "llama-dense": ["completion"],
            "nomic-bert": ["embedding"],
        }
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        for host in ("h1", "h2"):
            assert len(embeddings(lab.api(host))) == len(TEXTS)
            assert lab.api(host).request("/v1/chat/completions", chat)["model"] == "llama-dense"
            status, answer = lab.api(host).status_of("/v1/chat/completions", chat | {"model": "nomic-bert"})
            assert status == 400 and "only makes embeddings, at /v1/embeddings" in answer["error"]["message"]
        assert "nomic-bert" not in lab.nodes["h1"].command("agents").stdout
    finally:
        for host in ("h1", "h2"):
            lab.stop(host, signal.SIGTERM)
