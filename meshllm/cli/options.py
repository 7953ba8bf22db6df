"""Options: how they are declared and listed, those that several commands share, and what the user chose for a node."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

_PREFIX = "MESH_LLM_"


class Option(click.Option):
    """Listed under the heading `group`, and set by the environment variable that bears its name.

    The variable depends on the option alone, so one setting reaches every command that has the option. `envvar` names
    another variable where two commands mean different things by the same option.
    """

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.envvar = self.envvar or _PREFIX + _long(self).removeprefix("--").replace("-", "_").upper()


def _long(parameter: click.Option) -> str:
    """Its spelling with two dashes."""
    return next(spelling for spelling in parameter.opts if spelling.startswith("--"))


class Command(click.Command):
    """Lists its options by group, and names the environment variables."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, records in option_records(self, ctx).items():
            with formatter.section(group):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if own := [parameter for parameter in self.params if isinstance(parameter, Option)]:
            formatter.write_paragraph()
            with formatter.indentation():
                variable, name = own[0].envvar, _long(own[0])
                formatter.write_text(
                    f"Every option can be set by an environment variable, such as {variable} for {name}."
                )


def option_records(command: click.Command, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
    """Each group's options in the order of declaration: their spelling and their help text."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
            groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
    return groups


option = partial(click.option, cls=Option)

PORT = click.IntRange(0, 65535)  # the system would take 70000 for 4464

# Options of several commands. Called with a group in `serve`; the other commands have too few options for groups.
port = partial(
    option, "--port", type=PORT, default=9337, show_default=True, metavar="PORT", help="Port of this node's API."
)
threads = partial(
    option,
    "--threads",
    default=0,
    metavar="N",
    help="CPU threads that compute for other machines; default: one per core.",
)
ctx = partial(
    option,
    "--ctx",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of context; default: as many as fit, up to the model's own.",
)
min_ctx = partial(
    option,
    "--min-ctx",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Do not serve a model with less context than this, unless its own is shorter.",
)
max_vram = partial(
    option,
    "--max-vram",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Lend at most this much memory of each device.",
)


@dataclass(frozen=True)
class ServeConfig:
    """The options of `mesh-llm serve`, field by field."""

    model: tuple[str, ...]
    join: str | None
    client: bool
    host: str
    port: int
    bind_port: int
    quic: str | None
    advertise: tuple[str, ...]
    name: str | None
    identity: Path | None
    split: bool
    draft: str | None
    draft_max: int | None
    no_draft: bool
    no_fetch: bool
    api_key: str
    console: int | None
    console_host: str
    cors_origin: tuple[str, ...]
    max_vram: float | None
    stages: tuple[str, ...]
    tensor_split: tuple[float, ...] | None
    device: str | None
    threads: int
    bin_dir: Path | None
    engine_log: Path | None
    log_json: bool
    verbose: bool
    ctx: int | None
    min_ctx: int
    engine_args: tuple[str, ...]

    @property
    def llama_args(self) -> tuple[str, ...]:
        """Options of llama-server; what the user gives after -- comes last."""
        return (*(("-c", str(self.ctx)) if self.ctx else ()), *self.engine_args)

    @property
    def draft_tokens(self) -> int | None:
        """Tokens to draft per step; 0 turns speculative decoding off, None leaves it to what drafts."""
        return 0 if self.no_draft else self.draft_max


def parse_split(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """The shares in "0.67,0.33". Raises click.BadParameter."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter("expected numbers separated by commas, such as 0.67,0.33") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")
