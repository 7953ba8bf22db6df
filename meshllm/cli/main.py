"""The `mesh-llm` command: serves a model when no other command is named."""

from __future__ import annotations

import sys
from typing import Any

import click

from meshllm import __version__
from meshllm.cli.agents import agents
from meshllm.cli.download import download
from meshllm.cli.drop import drop
from meshllm.cli.serve import serve
from meshllm.cli.status import status
from meshllm.cli.token import token
from meshllm.errors import MeshLlmError


class DefaultGroup(click.Group):
    """`mesh-llm --model X` means `mesh-llm serve --model X`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "--version", *self.list_commands(ctx)}
        if not args or args[0] not in own:
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "device-server"])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "device-server":  # needs the compiled extension, which a lite client may lack
            from meshllm.cli.device_server import device_server

            return device_server
        return super().get_command(ctx, name)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(
            ctx.command_path, "[serve] [--model MODEL] [--join TOKEN] [OPTIONS] [-- LLAMA_SERVER_OPTIONS]"
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeshLlmError as error:
            click.echo(f"mesh-llm: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=DefaultGroup, context_settings={"auto_envvar_prefix": "MESH_LLM"})
@click.version_option(__version__)
def main() -> None:
    """Run an LLM across several machines, behind one OpenAI-compatible endpoint."""


for command in (agents, download, drop, serve, status, token):
    main.add_command(command)
