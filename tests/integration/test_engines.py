"""llama-server's features over two stages and the host: each answers as llama-server does alone."""

from __future__ import annotations

import base64
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.archs import two_stages
from support.cut import rewrite
from support.engines import Engine, plain_and_split
from support.processes import ENGINE

from meshllm.models.capability import Pooling

WORDS = "Rome was not built in a day, and the people who built it were not always of one mind about the plan. "
RECURRENT = ("qwen35-dense", "qwen3next-moe", "falcon-h1-dense", "mamba2-dense")
OTHERS = ("gemma3-dense", "gpt-oss-moe", "glm-dsa-moe", "deepseek2-moe")
ASKED_BY_LOADER = "ROPE ''"  # a rotation of 0 dimensions, to choose where its factors lie


def ask(engine: Engine, prompt: Any, n_predict: int = 16, **options: Any) -> dict[str, Any]:
    """Greedy: the tokens, their three likeliest rivals, and how much of the prompt was computed."""
    options = {"cache_prompt": True, "return_tokens": True, "n_probs": 3} | options
    answer = engine.api.complete(prompt, n_predict, **options)
    likeliest = [[rival["id"] for rival in token["top_logprobs"]] for token in answer["completion_probabilities"]]
    return {"tokens": answer["tokens"], "likeliest": likeliest, "computed": answer["timings"]["prompt_n"]}


def test_a_full_context_is_shifted(model: Path, tmp_path: Path) -> None:
    with plain_and_split(model, tmp_path, ["-c", "256", "-np", "1", "--context-shift"]) as engines:
        alone, split = (ask(engine, "Count: 1 2 3", 300) for engine in engines)
    assert len(split["tokens"]) == 300 and split == alone


def test_parts_of_a_changed_prompt_are_reused(model: Path, tmp_path: Path) -> None:
    with plain_and_split(model, tmp_path, ["-np", "1", "--cache-reuse", "16"]) as engines:
        for engine in engines:
            ask(engine, "Preamble. " + WORDS * 5)
        alone, split = (ask(engine, "Another preamble! " + WORDS * 5) for engine in engines)
    assert split == alone and split["computed"] < 130


def test_a_conversation_comes_back_from_memory_and_from_a_file(model: Path, tmp_path: Path) -> None:
    first, other = "First. " + WORDS * 4, "Zebra. " + "The sun is hot. " * 20
    options = ["-np", "1", "--cache-ram", "500", "--slot-save-path", f"{tmp_path}/"]
    with plain_and_split(model, tmp_path, options) as engines:
        answers: list[list[dict[str, Any]]] = []
        for i, engine in enumerate(engines):
            answers.append([ask(engine, prompt) for prompt in (first, other, first)])
            engine.api.request("/slots/0?action=save", {"filename": f"slot{i}"})
            engine.api.request("/slots/0?action=erase", {})
            engine.api.request("/slots/0?action=restore", {"filename": f"slot{1 - i if i else 0}"})
            answers[-1].append(ask(engine, first))
    assert answers[0] == answers[1]
    assert [answer["computed"] for answer in answers[1][2:]] == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"),
        ("-fa", "off", "-ctk", "q4_0"),
        ("-ctk", "bf16", "-ctv", "bf16"),
        ("-ctk", "q8_0", "-ctv", "q5_1"),
        ("-ctk", "q4_0", "-ctv", "iq4_nl"),
    ],
)
def test_types_of_the_kv_cache(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    with plain_and_split(model, tmp_path, options) as engines:
        alone, split = (ask(engine, WORDS * 2) for engine in engines)
    assert split == alone


def test_several_answers_and_a_grammar(model: Path, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Say a number"}], "max_tokens": 12, "seed": 5}
    with plain_and_split(model, tmp_path, ["-np", "4"]) as engines:
        several, numbers = [], []
        for engine in engines:
            answer = engine.api.request("/v1/chat/completions", body | {"n": 3, "temperature": 1})
            several.append([choice["message"]["content"] for choice in answer["choices"]])
            answer = engine.api.request("/v1/chat/completions", body | {"grammar": "root ::= [0-9]+ [.]"})
            numbers.append(answer["choices"][0]["message"]["content"])
    assert len(several[1]) == 3 and several[0] == several[1]
    assert numbers[1][0].isdigit() and numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deepseek2-moe", ("--cpu-moe",)),
        ("deepseek2-moe", ("--n-cpu-moe", "1")),
        ("qwen3next-moe", ("-ot", "ffn_.*_exps=CPU")),
        ("gemma3-dense", ("--swa-full",)),
        ("gemma3-dense", ("-kvu", "-np", "4")),
        ("gpt-oss-moe", ("--no-kv-offload", "-fa", "off")),
        ("deepseek2-moe", ("--spec-type", "ngram-mod")),
        ("gemma3-dense", ("--spec-default",)),
        ("qwen35-dense", ("--spec-type", "ngram-cache")),
        ("gemma3-dense", ("--rope-scaling", "yarn", "--rope-scale", "2")),
        ("gemma3-dense", ("--backend-sampling",)),
    ],
)
def test_where_tensors_lie_and_what_is_guessed(
    tiny_models: Path, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    prompt = [5, 9, 17, 33, 65, 9, 17, 33, 65, 9, 17]
    with plain_and_split(tiny_models / f"{name}.gguf", tmp_path, ["-c", "512", *options]) as engines:
        alone, split = (engine.api.complete(prompt, 40, return_tokens=True)["tokens"] for engine in engines)
    assert len(split) == 40 and split == alone


@pytest.mark.parametrize("name", ["gemma3-dense", "gpt-oss-moe", "qwen35-dense"])
def test_each_tensor_is_split_over_the_stages(tiny_models: Path, tmp_path: Path, name: str) -> None:
    """They add up what each has computed, so the last digits differ."""
    options = ["-c", "512", "-fa", "on"]
    with plain_and_split(tiny_models / f"{name}.gguf", tmp_path, options, ["-sm", "tensor"]) as engines:
        rows = []
        for engine in engines:
            answer = engine.api.complete([5, 9, 17, 33, 65], 24, n_probs=3, return_tokens=True)
            likeliest = [token["top_logprobs"] for token in answer["completion_probabilities"]]
            rows.append((answer["tokens"], [[rival["logprob"] for rival in each] for each in likeliest]))
    assert rows[1][0] == rows[0][0]
    assert np.allclose(rows[1][1], rows[0][1], atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings(model: Path, tmp_path: Path, pooling: str) -> None:
    with plain_and_split(model, tmp_path, ["--embedding", "--pooling", pooling]) as engines:
        alone, split = (engine.api.request("/v1/embeddings", {"input": WORDS})["data"] for engine in engines)
    assert split[0]["embedding"] == pytest.approx(alone[0]["embedding"], abs=1e-5)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding models of random weights that state mean pooling, without options for llama-server."""
    folder = tmp_path_factory.mktemp("encoders")
    subprocess.run([ENGINE / "test-archs", "--others", "-o", folder, "-s", "1", "-a", "bert|embed|t5"], check=True)
    return folder


def vectors(engine: Engine, texts: list[Any], **options: Any) -> list[Any]:
    answer = engine.api.request("/v1/embeddings", {"input": texts} | options)
    return [each["embedding"] for each in answer["data"]]


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "nomic-bert-moe",
        "modern-bert",
        "jina-bert-v2",
        "neo-bert",
        "gemma-embedding",
        "llama-embed",
        "t5encoder",
    ],
)
def test_embedding_models(encoders: Path, tmp_path: Path, name: str) -> None:
    """Field report 39. Texts, tokens and base64, several at once."""
    texts = ["hello", WORDS, [5, 9, 17, 33]]
    with plain_and_split(encoders / f"{name}.gguf", tmp_path) as engines:
        alone, split = (vectors(engine, texts) for engine in engines)
        encoded = vectors(engines[1], texts, encoding_format="base64")
        lines = engines[1].process.output().splitlines()
    assert not [line for line in lines if "leaves to the host" in line and ASKED_BY_LOADER not in line]
    assert len({str(each) for each in split}) == 3
    assert np.allclose(split, alone, atol=1e-6)
    assert np.allclose([np.frombuffer(base64.b64decode(each), np.float32) for each in encoded], alone, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_another_pooling(encoders: Path, tmp_path: Path, pooling: str) -> None:
    with plain_and_split(encoders / "nomic-bert.gguf", tmp_path, ["--pooling", pooling]) as engines:
        alone, split = (vectors(engine, ["hello", WORDS]) for engine in engines)
    assert np.allclose(split, alone, atol=1e-6)


def test_an_input_as_long_as_the_context(encoders: Path, tmp_path: Path) -> None:
    """Longer than llama-server's own --ubatch-size, in which an encoder must read everything."""
    long = rewrite(encoders / "nomic-bert.gguf", tmp_path / "long.gguf", numbers={"nomic-bert.context_length": 2048})[0]
    tokens = [i % 100 for i in range(2000)]
    with plain_and_split(long, tmp_path) as engines:
        alone, split = (vectors(engine, [tokens]) for engine in engines)
    assert np.allclose(split, alone, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "modern-bert", "neo-bert"])
def test_rerankers(encoders: Path, tmp_path: Path, name: str) -> None:
    ranks = rewrite(encoders / f"{name}.gguf", tmp_path / "ranks.gguf", numbers={f"{name}.pooling_type": Pooling.RANK})
    body = {"query": "who built Rome?", "documents": [WORDS, "hello", "It was not built in a day."]}
    with plain_and_split(ranks[0], tmp_path) as engines:
        scores = []
        for engine in engines:
            answers = [engine.api.request(path, body)["results"] for path in ("/v1/rerank", "/reranking")]
            assert answers[0] == answers[1]
            scores.append({each["index"]: each["relevance_score"] for each in answers[0]})
    assert len(set(scores[1].values())) == 3
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in two layers, written by llama.cpp's test of architectures."""
    folder = tmp_path_factory.mktemp("tiny")
    names = "|".join(name.rsplit("-", 1)[0] for name in RECURRENT + OTHERS)
    subprocess.run([ENGINE / "test-archs", "-o", folder, "-s", "1", "-a", f"({names})"], check=True, timeout=120)
    return folder


@pytest.mark.parametrize("name", RECURRENT + OTHERS)
def test_a_state_is_saved_and_loaded(tiny_models: Path, tmp_path: Path, name: str) -> None:
    run_over_stages("test-save-load-state", tiny_models / f"{name}.gguf", tmp_path)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_is_rolled_back(tiny_models: Path, tmp_path: Path, name: str) -> None:
    run_over_stages("test-recurrent-state-rollback", tiny_models / f"{name}.gguf", tmp_path)


def test_a_state_comes_back_into_a_fragmented_cache(model: Path, tmp_path: Path) -> None:
    run_over_stages("test-state-restore-fragmented", model, tmp_path)


def test_threads_share_the_stages(model: Path, tmp_path: Path) -> None:
    """A model on each device alone, and one over all, with four contexts each, at once."""
    run_over_stages(
        "test-thread-safety", model, tmp_path, "-ub", "32", "-np", "4", "-t", "1", "-n", "16", "-p", "The meaning of"
    )


def run_over_stages(test: str, model: Path, folder: Path, *options: str) -> None:
    over = ("--device", "STAGE0,STAGE1,HOST", "-ngl", "99", "--tensor-split", "1,1,1", "-c", "256")
    command = [str(ENGINE / test), "--model", str(model), *over, *options]
    with two_stages(folder) as (environment, stages):
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        computed = [stage.counters()["graphs_computed"] for stage in stages]
    assert done.returncode == 0 and "is lost" not in done.stderr, (done.stdout + done.stderr)[-3000:]
    assert all(computed)


@pytest.mark.parametrize("name", RECURRENT + OTHERS)
def test_a_conversation_goes_on_is_regenerated_and_trimmed(tiny_models: Path, tmp_path: Path, name: str) -> None:
    """A recurrent state cannot be trimmed: llama-server goes back to a checkpoint of it."""
    numbers = random.Random(1)
    prompt = [numbers.randrange(4, 128) for _ in range(80)]
    prompts = (prompt, prompt, [*prompt, 5, 6, 7, 9, 11], [*prompt[:40], 9, 8, 7], prompt[::-1])
    options = ["-c", "1024", "-np", "1", "-ub", "32"]
    with plain_and_split(tiny_models / f"{name}.gguf", tmp_path, options) as engines:
        alone, split = ([ask(engine, each) for each in prompts] for engine in engines)
        engine = engines[1]
        waits = engine.waits()
        engine.api.complete(prompt[:9], 60)
        waits = engine.waits() - waits
        lines = engine.process.output().splitlines()
    assert split == alone
    assert split[1]["computed"] <= 4  # regenerated: the state came back
    assert waits < 2 * 60  # one a token, and those of the checkpoints
    assert not [line for line in lines if "leaves to the host" in line and ASKED_BY_LOADER not in line]
