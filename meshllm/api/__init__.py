"""The endpoint that clients talk to."""

from meshllm.api.access import Access
from meshllm.api.proxy import make_app, make_peer_app
from meshllm.api.routing import RequestInfo
from meshllm.api.target import PublicTarget, Served, Upstream

__all__ = [
    "Access",
    "PublicTarget",
    "RequestInfo",
    "Served",
    "Upstream",
    "make_app",
    "make_peer_app",
]
