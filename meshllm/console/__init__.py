"""The dashboard: one live page, served by any node."""

from meshllm.console.app import make_console

__all__ = ["make_console"]
