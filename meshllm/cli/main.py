"""The `mesh-llm` command: serves a model when no other command is named."""

from __future__ import annotations

import sys
from typing import Any

import click

from meshllm import __version__
from meshllm.cli.agents import agents
from meshllm.cli.completion import completion
from meshllm.cli.device_server import device_server
from meshllm.cli.download import download
from meshllm.cli.drop import drop
from meshllm.cli.plan import plan
from meshllm.cli.serve import serve
from meshllm.cli.status import status
from meshllm.cli.token import token
from meshllm.errors import MeshLlmError

_FAILURE = 2  # click's exit code for a wrong option
_EXTENSION = "meshllm.rpc._native"  # a lite client runs without it
_OWN_OPTIONS = ("--help", "--version")
_EXAMPLES = """\b
Examples:
  mesh-llm --model qwen3-32b      serve a model; the same as mesh-llm serve
  mesh-llm --join TOKEN           lend this machine to a mesh
  mesh-llm serve --help           all options for serving
"""


class DefaultGroup(click.Group):
    """`mesh-llm --model X` means `mesh-llm serve --model X`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # While a shell completes an empty line, every command is still open.
        to_serve = not ctx.resilient_parsing if not args else args[0].startswith("-") and args[0] not in _OWN_OPTIONS
        return super().parse_args(ctx, ["serve", *args] if to_serve else args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        return super().shell_complete(ctx, incomplete) + serve.shell_complete(ctx, incomplete)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[COMMAND] [OPTIONS]...")

    def invoke(self, ctx: click.Context) -> Any:
        """Expected errors end the program with one line, all others with a traceback."""
        try:
            return super().invoke(ctx)
        except MeshLlmError as error:
            _fail(error)
        except ModuleNotFoundError as error:
            if error.name != _EXTENSION:
                raise
            _fail(error)  # its message says how to build the extension


def _fail(error: Exception) -> None:
    click.echo(f"mesh-llm: {error}", err=True)
    sys.exit(_FAILURE)


@click.group(cls=DefaultGroup, epilog=_EXAMPLES)
@click.version_option(__version__)
def main() -> None:
    """Run an LLM across several machines, behind one OpenAI-compatible endpoint.

    Without a command, mesh-llm serves a model.
    """


for command in (agents, completion, device_server, download, drop, plan, serve, status, token):
    main.add_command(command)
