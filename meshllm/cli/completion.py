"""`mesh-llm completion`: the script that a shell needs to complete mesh-llm's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from meshllm.cli.options import Command

_EXAMPLES = """\b
Examples:
  eval "$(mesh-llm completion bash)"                  in ~/.bashrc; Bash 4.4+
  eval "$(mesh-llm completion zsh)"                   in ~/.zshrc
  mesh-llm completion fish > ~/.config/fish/completions/mesh-llm.fish
"""


@click.command("completion", cls=Command, epilog=_EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands and options in a shell."""
    script = get_completion_class(shell)
    assert script  # click has one for each of these shells
    click.echo(script(ctx.find_root().command, {}, "mesh-llm", "_MESH_LLM_COMPLETE").source())
