"""llama-server's ways to guess tokens ahead, over two stages and the host: the answers are those without guesses."""

from __future__ import annotations

import http.client
import json
import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import heads
from support.engines import Engine, plain_and_split
from support.engines import engine as an_engine
from support.processes import in_parallel

HEADED = (
    "qwen35-dense",
    "qwen35moe-moe",
    "deepseek2-moe",
    "glm-dsa-moe",
    "hy_v3-moe",
    "cohere2moe-moe",
    "qwen3next-moe",
)
COPIED = ("qwen3next-moe",)  # a wrong guess brings a recurrent state to the host and back
MTP = ("--spec-type", "draft-mtp", "--spec-draft-n-max", "3")
CODE = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n"
numbers = random.Random(1)
PROMPTS = [[numbers.randrange(4, 128) for _ in range(12)] for _ in range(6)]


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, in two layers and one NextN layer."""
    folder = tmp_path_factory.mktemp("tiny")
    heads.tiny_models(folder, *HEADED)
    return folder


def answer(engine: Engine, prompt: Any, n_predict: int, **options: Any) -> dict[str, Any]:
    """The tokens; how many were guessed, and how many of those rightly."""
    whole = engine.api.complete(prompt, n_predict, return_tokens=True, **options)
    counts = {key: whole["timings"].get(key, 0) for key in ("draft_n", "draft_n_accepted")}
    return {"tokens": whole["tokens"], **counts}


@pytest.mark.parametrize("name", HEADED)
def test_a_models_own_head(tiny_models: Path, tmp_path: Path, name: str) -> None:
    """It is on the host: a step costs one wait for the stages, as a token does without guesses."""
    model = tiny_models / f"{name}-mtp.gguf"
    with an_engine(model, tmp_path) as engine:
        greedy = engine.api.complete(PROMPTS[0], 64, return_tokens=True)["tokens"]
    with plain_and_split(model, tmp_path, MTP) as (alone, split):
        expected, found = (answer(engine, PROMPTS[0], 64) for engine in (alone, split))
        before = split.waits()
        again = answer(split, PROMPTS[0], 64)
        waits = split.waits() - before
    assert found == expected == again and found["tokens"] == greedy
    assert 0 < found["draft_n_accepted"] < found["draft_n"]
    steps = 64 - found["draft_n_accepted"]
    assert waits <= steps * (3 if name in COPIED else 1) + 12  # and those for new shapes


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_drafts_that_are_fed_with_states_of_layers_on_stages(model: Path, tmp_path: Path, kind: str) -> None:
    draft = getattr(heads, kind)(model, tmp_path / "draft.gguf", [2, 14, 27])  # one on each stage and on the host
    options = ("--spec-type", f"draft-{kind}", "--spec-draft-model", str(draft), "--spec-draft-n-max", "3")
    with an_engine(model, tmp_path) as engine:
        greedy = engine.api.complete(CODE, 40, return_tokens=True)["tokens"]
    with plain_and_split(model, tmp_path, options) as (alone, split):
        expected, found = (answer(engine, CODE, 40) for engine in (alone, split))
        before = split.waits()
        again = answer(split, CODE, 40)
        waits = split.waits() - before
    assert found == expected == again and found["tokens"] == greedy and found["draft_n"] > 40
    assert waits <= 2 * (40 - found["draft_n_accepted"]) + 12  # one for each stage: the states come with the result


@pytest.mark.parametrize("kind", ["ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"])
def test_guesses_from_repetition(model: Path, tmp_path: Path, kind: str) -> None:
    sizes = [arg for each in ("simple", "map-k", "map-k4v") for arg in (f"--spec-ngram-{each}-size-n", "4")]
    sizes += [arg for each in ("simple", "map-k", "map-k4v") for arg in (f"--spec-ngram-{each}-size-m", "8")]
    sizes += ["--spec-ngram-mod-n-match", "6", "--spec-ngram-mod-n-min", "1", "--spec-ngram-mod-n-max", "8"]
    prompt = 3 * "one two three four five six seven eight nine ten. " + "one two three four"
    with plain_and_split(model, tmp_path, ("--spec-type", kind, *sizes)) as (alone, split):
        expected, found = (answer(engine, prompt, 40) for engine in (alone, split))
    assert found == expected and found["draft_n_accepted"] > 0


class Client(threading.Thread):
    """Asks for a long answer, and hangs up after some of its tokens."""

    def __init__(self, engine: Engine, slot: int, prompt: list[int], n_tokens: int) -> None:
        super().__init__()
        self._url = engine.api.base.removeprefix("http://")
        self._body = {"prompt": prompt, "n_predict": 9999, "temperature": 0, "stream": True, "ignore_eos": True}
        self._body |= {"id_slot": slot, "cache_prompt": False}
        self._n_tokens = n_tokens
        self.heard = 0
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._url, timeout=60)
        connection.request("POST", "/completion", json.dumps(self._body))
        stream = connection.getresponse()
        while self.heard < self._n_tokens and (line := stream.readline()):
            self.heard += line.startswith(b"data: {")
        stream.close()
        connection.close()


@pytest.mark.parametrize("name", ["qwen35-dense", "deepseek2-moe"])
def test_a_client_hangs_up_while_guesses_are_verified(tiny_models: Path, tmp_path: Path, name: str) -> None:
    """The other slots' answers, and the next ones of the same slot, are as if nothing had happened."""
    model = tiny_models / f"{name}-mtp.gguf"
    with an_engine(model, tmp_path) as engine:
        expected = [engine.api.complete(prompt, 160, return_tokens=True)["tokens"] for prompt in PROMPTS]
    with plain_and_split(model, tmp_path, ("-c", "32768", "-np", "3", *MTP)) as (_, split):
        for i in range(1, 5):
            leaving = Client(split, 0, PROMPTS[0], 3 * i)
            others = in_parallel(
                [partial(answer, split, PROMPTS[j], 160, id_slot=slot) for slot, j in ((1, 0), (2, i + 1))]
            )
            leaving.join(60)
            assert leaving.heard == 3 * i
            after = answer(split, PROMPTS[i], 160, id_slot=0)
            assert [each["tokens"] for each in (*others, after)] == [expected[0], expected[i + 1], expected[i]]
            assert after["draft_n_accepted"] > 0
        assert split.process.output().count("cancel task") == 4
