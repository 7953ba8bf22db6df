"""Every option has one environment variable, whichever command reads it, and README's tables are current."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from meshllm.cli.main import main
from meshllm.cli.options import Option, ServeConfig, is_loopback, option_records, parse_split
from meshllm.cli.serve import serve

# The one option that means different things: a switch here, a model's name in `serve`.
NAMED_APART = {("download", "--draft"): "MESH_LLM_DOWNLOAD_DRAFT"}


def options() -> Iterator[tuple[str, click.Option]]:
    for name, command in main.commands.items():
        yield from ((name, o) for o in command.params if isinstance(o, click.Option))


@pytest.mark.parametrize(("command", "option"), [pytest.param(c, o, id=f"{c} {o.opts[0]}") for c, o in options()])
def test_the_variable_follows_from_the_option_alone(command: str, option: click.Option) -> None:
    name = next(spelling for spelling in option.opts if spelling.startswith("--"))
    expected = "MESH_LLM_" + name.removeprefix("--").replace("-", "_").upper()
    assert isinstance(option, Option)
    assert option.envvar == NAMED_APART.get((command, name), expected)
    assert option.envvar not in ("MESH_LLM_MODELS", "MESH_LLM_BACKEND_CONFIG")  # other things


def test_a_variable_belongs_to_one_option() -> None:
    names: dict[object, set[str]] = {}
    for _, each in options():
        names.setdefault(each.envvar, set()).add(each.opts[-1])
    assert all(len(found) == 1 for found in names.values()), names


@pytest.mark.parametrize("command", ["serve", "status", "token", "drop", "agents"])
def test_one_variable_sets_the_port_of_all_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_PORT", "9555")
    arguments = ["some-model"] if command == "drop" else []
    context = main.commands[command].make_context(command, [*arguments])
    assert context.params["port"] == 9555
    context = main.commands[command].make_context(command, ["--port", "9666", *arguments])
    assert context.params["port"] == 9666


def test_variables_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"MODEL": "one two", "CONSOLE": "3131", "SPLIT": "1", "TENSOR_SPLIT": "0.5,0.5"}.items():
        monkeypatch.setenv(f"MESH_LLM_{name}", text)
    config = ServeConfig(**serve.make_context("serve", []).params)
    assert config.model == ("one", "two") and config.console == 3131
    assert config.split and config.tensor_split == (0.5, 0.5) and not config.client
    monkeypatch.setenv("MESH_LLM_DRAFT", "a-model")
    assert main.commands["download"].make_context("download", []).params["draft"] is False


def test_serve_lists_its_options_in_four_groups() -> None:
    groups = option_records(serve, click.Context(serve))
    assert list(groups) == ["Model", "Mesh", "API", "Engine", "Options"]
    assert [spelling for spelling, _ in groups["Options"]] == ["--help"]


def test_the_tables_of_readme_are_current() -> None:
    script = Path(__file__).parents[3] / "scripts" / "readme-options"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_draft_tokens() -> None:
    assert ServeConfig(**serve.make_context("serve", ["--draft-max", "3"]).params).draft_tokens == 3
    assert ServeConfig(**serve.make_context("serve", ["--no-draft"]).params).draft_tokens == 0


def test_parse_split() -> None:
    context, parameter = click.Context(serve), serve.params[0]
    assert parse_split(context, parameter, None) is None
    assert parse_split(context, parameter, "0.6,0.4") == (0.6, 0.4)
    with pytest.raises(click.BadParameter, match="separated by commas"):
        parse_split(context, parameter, "0.6;0.4")


def test_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.12", "example.com"))
