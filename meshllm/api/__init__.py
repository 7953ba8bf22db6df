"""The endpoint that clients talk to."""

from meshllm.api.proxy import Target, make_app

__all__ = ["Target", "make_app"]
