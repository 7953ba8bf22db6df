"""The endpoint that clients talk to."""

from meshllm.api.proxy import make_app

__all__ = ["make_app"]
