"""Help works where nothing is compiled, loads no ggml where it is, and a mistyped command serves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import meshllm
from meshllm.cli.main import main


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that was never compiled."""
    folder = tmp_path_factory.mktemp("uncompiled")
    package = Path(meshllm.__file__).parent
    shutil.copytree(package, folder / "meshllm", ignore=shutil.ignore_patterns("*.so", "_bin", "__pycache__"))
    return folder


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "meshllm", *args], capture_output=True, text=True, env=environment, cwd=folder
    )


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_needs_nothing_compiled(uncompiled: Path, command: str) -> None:
    result = run(uncompiled, *command.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: mesh-llm {command}") and result.stderr == ""


@pytest.mark.parametrize("arguments", ["device-server --listen 127.0.0.1:0", "--stage 127.0.0.1:1", ""])
def test_what_needs_the_extension_says_so_in_one_line(uncompiled: Path, arguments: str) -> None:
    result = run(uncompiled, *arguments.split(), *(["--port", "0"] if "--listen" not in arguments else []))
    assert result.returncode == 2
    assert result.stderr.startswith("mesh-llm: meshllm's compiled extension is missing: run `pip install .`")
    assert len(result.stderr.splitlines()) == 1


def test_help_loads_no_ggml() -> None:
    code = (
        "import sys; from meshllm.cli.main import main\n"
        "main(['--help'], standalone_mode=False); main(['device-server', '--help'], standalone_mode=False)\n"
        "assert not [m for m in sys.modules if m.startswith('meshllm.rpc')], sys.modules"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "device-server" in result.stdout


def test_options_without_a_command_are_those_of_serve() -> None:
    result = CliRunner().invoke(main, ["--client"])
    assert result.exit_code == 2 and "--client needs --join" in result.output
    assert "Usage: main serve" in CliRunner().invoke(main, ["--port", "1", "--help"]).output


def test_a_mistyped_command_is_none() -> None:
    result = CliRunner().invoke(main, ["statsu"])
    assert result.exit_code == 2 and "No such command 'statsu'" in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0 and f"_MESH_LLM_COMPLETE={shell}_complete" in result.output


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "st", "status"),
        ([], "--mo", "--model"),
        (["--model", "x"], "--jo", "--join"),
        (["token"], "--ex", "--expires"),
        (["completion"], "z", "zsh"),
    ],
)
def test_what_is_completed(words: list[str], incomplete: str, expected: str) -> None:
    completions = ShellComplete(main, {}, "mesh-llm", "_MESH_LLM_COMPLETE").get_completions(words, incomplete)
    assert [each.value for each in completions] == [expected]
