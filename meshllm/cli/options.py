"""What the user chose for a node, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click


@dataclass(frozen=True)
class ServeConfig:
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
    draft_max: int
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
    engine_args: tuple[str, ...]

    @property
    def draft_tokens(self) -> int:
        """To be guessed at a time; 0 for none."""
        return 0 if self.no_draft else self.draft_max


def parse_split(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter("write numbers with commas between, such as 0.67,0.33") from None


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
