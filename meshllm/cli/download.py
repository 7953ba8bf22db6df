"""`mesh-llm download`: lists the catalog, or downloads a model."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from meshllm.cli.options import Command, option
from meshllm.errors import MeshLlmError
from meshllm.models.catalog import CATALOG, Entry
from meshllm.models.download import download as fetch
from meshllm.models.download import find_source
from meshllm.models.folders import find_models
from meshllm.models.names import entry_of, matching
from meshllm.models.projectors import projector_beside
from meshllm.paths import models_folder
from meshllm.units import in_gb

_EXAMPLES = """\b
Examples:
  mesh-llm download                                 list the catalog
  mesh-llm download 32b --draft                     with its draft model
  mesh-llm download somebody/Some-GGUF:Q5_K_M       from the hub
"""
_LINE_S = 5.0  # between progress lines where there is no terminal


@click.command("download", cls=Command, epilog=_EXAMPLES)
@click.argument("model", required=False)
@option(
    "--draft",
    is_flag=True,
    help="Also download the draft model that the catalog pairs with it.",
    envvar="MESH_LLM_DOWNLOAD_DRAFT",  # MESH_LLM_DRAFT names a model
)
def download(model: str | None, draft: bool) -> None:
    """Download a model, or list the catalog.

    MODEL is a name in the catalog, USER/REPOSITORY[:QUANT] on the Hugging Face hub, or the URL of a GGUF file. It is
    saved in ~/.models, or in the folder that MESH_LLM_MODELS names. Without MODEL, the catalog and the models on disk
    are listed.
    """
    if model is None:
        click.echo("\n".join(catalog_lines()))
        return
    paths = _get(model)
    if draft:
        entry = CATALOG.find(model) or entry_of(paths[0].stem)
        paired = CATALOG.draft_of(entry) if entry else None
        if paired is None:
            raise MeshLlmError(f"the catalog has no draft model for {model}")
        _get(paired.name)
    click.echo(paths[0])


def catalog_lines() -> list[str]:
    """A table of the catalog and of the other models on disk, and how to download one."""
    on_disk = find_models()
    rows: list[tuple[str, ...]] = [("model", "size", "quant", "memory", "draft", "images", "licence", "on disk")]
    known: set[str] = set()
    for entry in CATALOG.entries:
        here = matching(entry.name, on_disk)
        known.update(here)
        rows.append(_row(entry, bool(here)))
    for name in sorted(on_disk.keys() - known):
        images = "yes" if projector_beside(on_disk[name], name) else ""
        rows.append((name, in_gb(on_disk[name].stat().st_size), "", "", "", images, "", "yes"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows] + [
        "",
        f"mesh-llm download NAME [--draft] saves one in {models_folder()}; USER/REPOSITORY:QUANT is one on the hub",
        "~: never compared with the hub, whose list of the repository decides at download",
    ]


def _row(entry: Entry, here: bool) -> tuple[str, ...]:
    names = ", ".join([*entry.short, entry.name])
    about = "~" if entry.unchecked else ""
    return (
        names,
        about + in_gb(entry.size_bytes),
        entry.quantisation,
        about + in_gb(entry.min_memory_bytes),
        _draft(entry),
        "yes" if entry.projector else "-",
        entry.licence,
        "yes" if here else "-",
    )


def _draft(entry: Entry) -> str:
    if draft := CATALOG.draft_of(entry):
        return draft.short[0]
    return "is a draft" if entry.drafts else "MTP" if entry.mtp else "-"


def _get(name: str) -> list[Path]:
    source = find_source(name)
    shown = _ProgressDisplay()
    try:
        return fetch(source, shown.progress)
    finally:
        shown.end()


class _ProgressDisplay:
    """A bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._file, self._line_at = "", 0.0
        self._began, self._first = 0.0, 0
        self._bar: object = None

    def progress(self, file: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._draw(file, done, total)
            return
        now = time.monotonic()
        if file != self._file:
            self._file, self._began, self._first, self._line_at = file, now, done, 0.0
        if now - self._line_at >= _LINE_S or done == total:
            self._line_at = now
            print(self._line(done, total, now - self._began), file=sys.stderr, flush=True)

    def _line(self, done: int, total: int, seconds: float) -> str:
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        line = f"{self._file}: {done / 1e6:.0f} MB"
        if total:
            line = f"{self._file}: {100 * done // total} % of {total / 1e6:.0f} MB"
        if rate:
            line += f", {rate / 1e6:.1f} MB/s"
            line += f", {(total - done) / rate:.0f} s left" if total > done else ""
        return line

    def _draw(self, file: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if file != self._file:
            self.end()
            self._file = file
            self._bar = tqdm(total=total or None, initial=done, desc=file, unit="B", unit_scale=True, position=0)
        bar = self._bar
        assert isinstance(bar, tqdm)
        bar.update(done - bar.n)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()  # type: ignore[attr-defined]
            self._bar = None
