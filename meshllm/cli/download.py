"""`mesh-llm download`: the catalog, and models onto this machine's disk."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from meshllm.errors import MeshLlmError
from meshllm.models.catalog import CATALOG, Entry
from meshllm.models.download import download as fetch
from meshllm.models.download import find_source
from meshllm.models.folders import find_models
from meshllm.models.names import entry_of, matching
from meshllm.paths import models_folder
from meshllm.units import in_gb

_LINE_S = 5.0  # between lines where there is no terminal


@click.command("download")
@click.argument("model", required=False)
@click.option("--draft", is_flag=True, help="Also the small model that guesses ahead for it.")
def download(model: str | None, draft: bool) -> None:
    """Get a model into ~/.models: a name of the catalog, USER/REPOSITORY[:QUANT] of the hub, or a URL.

    Without MODEL the catalog is listed.
    """
    if model is None:
        click.echo("\n".join(catalog_lines()))
        return
    paths = _get(model)
    if draft:
        entry = CATALOG.find(model) or entry_of(paths[0].stem)
        paired = CATALOG.draft_of(entry) if entry else None
        if paired is None:
            raise MeshLlmError(f"the catalog pairs no draft with {model}")
        _get(paired.name)
    click.echo(paths[0])


def catalog_lines() -> list[str]:
    on_disk = find_models()
    rows: list[tuple[str, ...]] = [("model", "size", "quant", "memory", "draft", "licence", "on disk")]
    known: set[str] = set()
    for entry in CATALOG.entries:
        here = matching(entry.name, on_disk)
        known.update(here)
        rows.append(_row(entry, bool(here)))
    for name in sorted(on_disk.keys() - known):
        rows.append((name, in_gb(on_disk[name].stat().st_size), "", "", "", "", "yes"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows] + [
        "",
        f"mesh-llm download NAME [--draft] puts it into {models_folder()}; USER/REPOSITORY:QUANT takes any other",
    ]


def _row(entry: Entry, here: bool) -> tuple[str, ...]:
    names = ", ".join([*entry.short, entry.name])
    draft = CATALOG.draft_of(entry)
    return (
        names,
        in_gb(entry.size_bytes),
        entry.quantisation,
        in_gb(entry.min_memory_bytes),
        draft.short[0] if draft else "is one" if entry.drafts else "-",
        entry.licence,
        "yes" if here else "-",
    )


def _get(name: str) -> list[Path]:
    source = find_source(name)
    shown = _Shown()
    try:
        return fetch(source, shown.progress)
    finally:
        shown.end()


class _Shown:
    """A bar on a terminal, a line now and then elsewhere."""

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
