"""Programs that people use, unchanged, against the endpoint of a host, of a worker and of a lite client."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
from support.processes import BIN, MeshLlm, eventually

NAME = "SmolLM2-135M-Instruct.Q4_1"
TEMPLATE = Path(__file__).parents[1] / "support" / "tools.jinja"  # the model's own knows no tools
ENGINE_ARGS: tuple[str, ...] = ("--", "-c", "16384", "-np", "32", "-t", "2", "--embeddings", "--pooling", "mean")
ENGINE_ARGS += ("--chat-template-file", str(TEMPLATE))
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


@pytest.fixture(scope="module")
def nodes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, MeshLlm]]:
    """The worker lends too little to serve: what it is asked goes to the host."""
    folders = {"MESH_LLM_MODELS": str(tmp_path_factory.mktemp("none"))}
    with ExitStack() as stack:
        host = stack.enter_context(MeshLlm("--model", str(model), *ENGINE_ARGS, env=folders)).ready()
        token = host.command("token").stdout.strip()
        worker = stack.enter_context(MeshLlm("--join", token, "--max-vram", "0.01", env=folders))
        client = stack.enter_context(MeshLlm("--join", token, "--client", env=folders))
        yield {"host": host, "worker": worker.ready(), "client": client.ready()}


@pytest.fixture(params=["host", "worker", "client"])
def node(nodes: dict[str, MeshLlm], request: pytest.FixtureRequest) -> MeshLlm:
    return nodes[request.param]


@pytest.fixture
def client(node: MeshLlm) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{node.api.base}/v1", api_key="any") as client:
        yield client


def slots_in_use(node: MeshLlm) -> int:
    return sum(slot["is_processing"] for slot in node.api.request("/slots"))


def test_openai_chat_and_stream(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": "Say hello."}]
    whole = client.chat.completions.create(messages=messages, **asked)  # type: ignore[call-overload]
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **asked)  # type: ignore[call-overload]
        if chunk.choices
    ]
    assert len(parts) > 3 and "".join(parts) == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 12 and whole.model == NAME


def test_openai_tools_and_schema(client: openai.OpenAI) -> None:
    messages: list[Any] = []
    for town in ("Oslo", "Paris", "Berlin"):  # so small a model needs examples
        call = {"name": "weather", "arguments": json.dumps({"town": town})}
        messages.append({"role": "user", "content": f"How is the weather in {town}?"})
        messages.append({"role": "assistant", "tool_calls": [{"id": town, "type": "function", "function": call}]})
        messages.append({"role": "tool", "tool_call_id": town, "content": "fine"})
        messages.append({"role": "assistant", "content": "It is fine."})
    tools: Any = [TOOL]
    made: list[tuple[str, Any]] = []
    for town in ("Rome", "Madrid", "Vienna", "London", "Lisbon", "Athens"):  # one of them gets a call, on any processor
        question: Any = {"role": "user", "content": f"How is the weather in {town}?"}
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[*messages, question],
            tools=tools,
            tool_choice="required",
            max_tokens=60,
            temperature=0,
        )
        made += [(town, call) for call in answer.choices[0].message.tool_calls or []]
    assert made and all(call.type == "function" and call.function.name == "weather" for _, call in made)
    assert {"town": made[0][0]} in [json.loads(call.function.arguments) for _, call in made]
    schema: Any = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "A number?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        max_tokens=40,
        temperature=0,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["n"], int)


def test_openai_embeddings_models_and_errors(client: openai.OpenAI) -> None:
    vectors = client.embeddings.create(model=NAME, input=["a cat", "a kitten"], encoding_format="float").data
    assert [len(v.embedding) for v in vectors] == [576, 576]
    assert [m.id for m in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match=f"served: {NAME}"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], temperature="warm")  # type: ignore[call-overload]


def test_openai_responses_and_anthropic_messages(client: openai.OpenAI, node: MeshLlm) -> None:
    answer = client.responses.create(model=NAME, input="Say hello.", max_output_tokens=8, temperature=0)
    assert answer.output_text
    message = {"model": NAME, "max_tokens": 8, "messages": [{"role": "user", "content": "Say hello."}]}
    assert node.api.request("/v1/messages", message)["content"][0]["text"]
    assert node.api.request("/tokenize", {"content": "Hello"})["tokens"]


def test_openai_cancel_frees_the_slot(client: openai.OpenAI, nodes: dict[str, MeshLlm]) -> None:
    stream = client.completions.create(
        model=NAME, prompt="Once", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert slots_in_use(nodes["host"]) == 1
    stream.close()
    eventually(lambda: slots_in_use(nodes["host"]) == 0, 5, "the work is cancelled")


def test_llm_with_its_openai_plugin(node: MeshLlm, tmp_path: Path) -> None:
    entry = f"- model_id: mesh\n  model_name: {NAME}\n  api_base: {node.api.base}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": "any"}
    for args in ((), ("--no-stream",)):
        argv = [str(BIN / "llm"), "-m", "mesh", "-o", "temperature", "0", "-o", "max_tokens", "8", *args, "Say hello."]
        result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0 and result.stdout.strip(), result.stderr


async def _stream(session: aiohttp.ClientSession, base: str, prompt: str, n: int) -> str:
    body = {"model": NAME, "prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True, "seed": 1}
    text = ""
    async with session.post(f"{base}/v1/completions", json=body | {"ignore_eos": True}) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


@pytest.mark.timeout(300)
def test_32_streams_through_a_worker_for_a_minute(nodes: dict[str, MeshLlm]) -> None:
    """Each stream copies its own words, so that a token of another's, or a missing one, shows."""
    worker = nodes["worker"]
    process = psutil.Process(worker.popen.pid)
    rss: list[int] = []
    rounds = [0]
    deadline = time.monotonic() + 60

    def prompt(i: int) -> str:
        return f"The secret word of stream {i} is word{i}. " * 6 + "The secret word of stream"

    async def run() -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64), timeout=timeout) as session:

            async def one(i: int) -> None:
                while time.monotonic() < deadline:
                    text = await _stream(session, worker.api.base, prompt(i), 24)
                    assert f"{i} is word{i}" in text, (i, text)
                    rounds[0] += 1
                    rss.append(process.memory_info().rss)

            async with asyncio.TaskGroup() as group:
                for i in range(100, 132):
                    group.create_task(one(i))

    asyncio.run(run())
    assert rounds[0] >= 64
    half = len(rss) // 2
    assert max(rss[half:]) < max(rss[:half]) * 1.05 + (2 << 20), (max(rss[:half]), max(rss[half:]))


def test_the_key_guards_every_path_but_health(model: Path) -> None:
    with MeshLlm("--model", str(model), "--api-key", "s3cret", "--", "-c", "512", "-t", "1") as node:
        node.ready()
        base = f"{node.api.base}/v1"
        with openai.OpenAI(base_url=base, api_key="wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        for path in ("/mesh/status", "/v1/models", "/completion", "/anything"):
            assert node.api.status_of(path)[0] == 401
        assert node.api.healthy()
        assert "OPENAI_API_KEY=YOUR_API_KEY" in node.command("agents").stdout and "s3cret" not in node.output()
        with openai.OpenAI(base_url=base, api_key="s3cret") as right:
            assert right.models.list().data[0].id == NAME
            assert right.completions.create(model=NAME, prompt="Hi", max_tokens=2).choices


def test_agents_are_told_how(nodes: dict[str, MeshLlm]) -> None:
    node = nodes["worker"]
    told = node.command("agents").stdout
    assert f"pi --provider mesh-llm --model {NAME}" in told and f"GOOSE_MODEL={NAME} goose session" in told
    config = json.loads(told[told.index("{") : told.rindex("}") + 1])["providers"]["mesh-llm"]
    assert config["models"] == [{"id": NAME}]
    with openai.OpenAI(base_url=config["baseUrl"], api_key=config["apiKey"]) as client:
        assert client.models.list().data[0].id == NAME
    assert f"GOOSE_MODEL={NAME}" in node.output()


def test_pages_of_others_are_refused(nodes: dict[str, MeshLlm]) -> None:
    def ask(method: str, origin: str, **headers: str) -> tuple[int, dict[str, str]]:
        async def run() -> tuple[int, dict[str, str]]:
            url = f"{nodes['worker'].api.base}/v1/models"
            async with (
                aiohttp.ClientSession() as session,
                session.request(method, url, headers={"Origin": origin} | headers) as response,
            ):
                return response.status, dict(response.headers)

        return asyncio.run(run())

    status, headers = ask("GET", "http://localhost:5173")
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
    assert ask("GET", "https://evil.example")[0] == 403
    status, headers = ask(
        "OPTIONS",
        "http://localhost:5173",
        **{"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"},
    )
    assert status == 204 and headers["Access-Control-Allow-Headers"] == "authorization"


def test_many_at_once_at_one_host_and_nobody_waits_for_ever(nodes: dict[str, MeshLlm]) -> None:
    """More requests than slots: they queue in the engine, all are answered."""
    answers: list[int] = []

    def ask() -> None:
        answers.append(nodes["client"].api.complete("Hi", 3)["tokens_predicted"])

    threads = [threading.Thread(target=ask) for _ in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert answers == [3] * 48
