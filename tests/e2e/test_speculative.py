"""Drafts: found or named, on the host only, and what status says of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import heads
from support.cut import rewrite
from support.processes import DeviceServer, MeshLlm, eventually

CODE = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n"
ENGINE_ARGS = ("--", "-c", "1024", "-t", "1")


@pytest.fixture(scope="module")
def draft(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without two of its layers: half of what it guesses is right."""
    target = tmp_path_factory.mktemp("draft") / "draft-Q4_1.gguf"
    return rewrite(model, target, [i for i in range(30) if i not in (25, 26)])[0]


@pytest.fixture(scope="module")
def expected(model: Path) -> Iterator[str]:
    with MeshLlm("--model", str(model), "--no-draft", *ENGINE_ARGS) as node:
        yield complete(node.ready())["content"]
        assert node.api.engine_status()["speculation"] is None


def complete(node: MeshLlm) -> Any:
    return node.api.complete(CODE, 40)


def speculation(node: MeshLlm) -> Any:
    return json.loads(node.command("status", "--json").stdout)["engine"]["speculation"]


def test_a_draft_that_is_named(model: Path, draft: Path, expected: str) -> None:
    with MeshLlm("--model", str(model), "--draft", str(draft), "--draft-max", "4", *ENGINE_ARGS) as node:
        assert complete(node.ready())["content"] == expected
        told = speculation(node)
        assert told["draft"] == "draft-Q4_1" and told["n_max"] == 4
        assert 0 < told["accepted"] < told["drafted"] and 1.5 < told["tokens_per_step"] <= 5
        assert re.search(
            r"draft draft-Q4_1, .*: \d+% accepted, \d\.\d+ tokens verified per step", node.command("status").stdout
        )


def test_a_draft_over_a_split_model_stays_on_the_host(model: Path, draft: Path, expected: str) -> None:
    with (
        DeviceServer("127.0.0.1:0", threads=1) as one,
        DeviceServer("127.0.0.1:0", threads=1) as two,
        MeshLlm(
            *("--model", str(model), "--draft", str(draft), "--draft-max", "4"),
            *("--stage", one.ready().address, "--stage", two.ready().address, *ENGINE_ARGS),
        ) as node,
    ):
        answer = complete(node.ready())
        assert answer["content"] == expected and answer["timings"]["draft_n_accepted"] > 10
        status = node.api.engine_status()
        assert status["speculation"]["tokens_per_step"] > 1.5
        assert sum(stage["n_layers"] for stage in status["stages"]) == 30
        n_steps = answer["timings"]["predicted_n"] - answer["timings"]["draft_n_accepted"]
        assert status["stages"][0]["counters"]["pushes"] < n_steps * 2 + 30  # a batch is one trip, not one each


def await_accepted_guesses(node: MeshLlm) -> None:
    """llama-server tells them in its log."""
    eventually(lambda: node.api.engine_status()["speculation"]["accepted"] > 0, 10, "accepted guesses")


def test_a_models_own_head_is_used_by_itself(tmp_path: Path) -> None:
    """On one machine and over stages, with the head on the host; --no-draft and a user's own choice leave it alone."""
    (model,) = heads.tiny_models(tmp_path, "qwen35-dense")
    prompt = [5, 9, 17, 33, 65, 9, 17, 33]
    ways = {"": ENGINE_ARGS, "--no-draft": ENGINE_ARGS, "own": (*ENGINE_ARGS, "--spec-type", "ngram-cache")}
    answers = []
    with DeviceServer("127.0.0.1:0", threads=1) as stage:
        address = stage.ready().address
        for way, engine_args in ways.items():
            flags = (way,) if way.startswith("--") else ()
            for stages in ((), ("--stage", address)):
                with MeshLlm("--model", str(model), *flags, *stages, *engine_args) as node:
                    answers.append(node.ready().api.complete(prompt, 40)["content"])
                    status = node.api.engine_status()
                    if way:
                        assert status["speculation"] is None
                    else:
                        told = status["speculation"]
                        assert (told["draft"], told["n_max"]) == ("mtp", 3)
                        await_accepted_guesses(node)
                    if stages:
                        assert status["host"]["n_layers"] == 1 and status["stages"][0]["n_layers"] == 2
    assert len(set(answers)) == 1


def test_the_catalogs_pair_is_found_on_disk(model: Path, draft: Path, expected: str) -> None:
    folder = Path(os.environ["MESH_LLM_MODELS"])
    (folder / "Qwen2.5-7B-Instruct-Q4_K_M.gguf").symlink_to(model)
    (folder / "qwen2.5-0.5b-instruct-q8_0.gguf").symlink_to(draft)
    with MeshLlm("--model", "7b", *ENGINE_ARGS) as node:
        assert complete(node.ready())["content"] == expected
        assert speculation(node)["draft"] == "qwen2.5-0.5b-instruct-q8_0" and speculation(node)["accepted"] > 0
    with MeshLlm("--model", "7b", "--no-draft", *ENGINE_ARGS) as node:
        assert complete(node.ready())["content"] == expected and speculation(node) is None


def test_repetition_is_guessed_without_a_draft_model(model: Path, expected: str) -> None:
    with MeshLlm("--model", str(model), "--draft", "ngram", *ENGINE_ARGS) as node:
        assert complete(node.ready())["content"] == expected
        numbers = "one two three four five six seven eight nine ten. "
        node.api.complete(3 * numbers + "one two three four", 22)  # which continues alike on any processor
        assert speculation(node)["draft"] == "ngram-simple" and speculation(node)["accepted"] > 0


def test_a_draft_that_there_is_not(model: Path) -> None:
    with MeshLlm("--model", str(model), "--draft", "nothing-of-the-kind", *ENGINE_ARGS) as node:
        assert node.wait() == 2 and "there is no model 'nothing-of-the-kind'" in node.output().splitlines()[-1]
    with MeshLlm("--model", str(model), "--draft", "ngram", "--no-draft", *ENGINE_ARGS) as node:
        assert node.wait() == 2 and "--draft and --no-draft cannot be combined" in node.output()
