"""Who may use the endpoint: pages, names of this machine, the key."""

from __future__ import annotations

import pytest

from meshllm.api.access import Access


@pytest.mark.parametrize(
    ("origin", "host", "admitted"),
    [
        ("http://localhost:3000", "localhost:9337", True),
        ("http://127.0.0.1", "localhost:9337", True),
        ("http://[::1]:80", "localhost:9337", True),
        ("http://192.168.1.5:9337", "192.168.1.5:9337", True),
        ("http://192.168.1.6:9337", "192.168.1.5:9337", False),
        ("https://chat.example", "localhost:9337", True),
        ("https://chat.example.evil.com", "localhost:9337", False),
        ("http://evil.com:9337", "evil.com:9337", False),
        ("null", "localhost:9337", False),
        ("http://[", "localhost:9337", False),
    ],
)
def test_pages_that_may_use_the_endpoint(origin: str, host: str, admitted: bool) -> None:
    access = Access(origins=("https://chat.example",), local=True)
    assert access.admits_origin(origin, host) is admitted
    assert Access(origins=("*",)).admits_origin(origin, host)


def test_names_that_lead_here() -> None:
    access = Access(local=True)
    assert [access.admits_host(h) for h in ("localhost:1", "127.0.0.1", "[::1]:5", "192.168.1.5", "evil.com:9")] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert Access(local=False).admits_host("box.example")


def test_the_key() -> None:
    access = Access("secret")
    assert access.admits_key({"Authorization": "Bearer secret"}) and access.admits_key({"X-Api-Key": "secret"})
    assert not any(access.admits_key(h) for h in ({}, {"Authorization": "Bearer x"}, {"Authorization": "secret"}))
    assert not access.admits_key({"Authorization": "Bearer \udcff"}) and Access().admits_key({})
