"""Commands for agents: quoted, and none where no model is served."""

from __future__ import annotations

import orjson

from meshllm.cli.agents import NO_KEY, launch_lines, snippets

URL = "http://127.0.0.1:9337/v1"


def test_without_models_there_is_nothing_to_launch() -> None:
    assert launch_lines(URL, [], NO_KEY) == [] and snippets(URL, [], NO_KEY) == []


def test_the_names_of_models_are_quoted_for_the_shell() -> None:
    pi, goose = launch_lines(URL, ["a b; rm -rf $HOME"], NO_KEY)
    assert "--model 'a b; rm -rf $HOME'" in pi
    assert "GOOSE_MODEL='a b; rm -rf $HOME' goose session" in goose
    assert "OPENAI_HOST=http://127.0.0.1:9337 " in goose and "OPENAI_API_KEY=mesh-llm " in goose


def test_the_configuration_of_pi_lists_every_model() -> None:
    config = next(s.text for s in snippets(URL, ["one", "two"], "YOUR_API_KEY") if "models.json" in s.title)
    provider = orjson.loads(config)["providers"]["mesh-llm"]
    assert provider["baseUrl"] == URL and provider["apiKey"] == "YOUR_API_KEY"
    assert [model["id"] for model in provider["models"]] == ["one", "two"]
