"""Where this node tells others to look for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from meshllm.quic.interfaces import own_addresses


def test_own_addresses_end_with_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {
        "lo": ["127.0.0.1", "::1"],
        "eth0": ["10.0.0.5", "fe80::1%eth0", "2001:db8::5", "aa:bb:cc:dd:ee:ff"],
        "docker0": ["172.17.0.1"],
    }
    entries = {name: [SimpleNamespace(address=a) for a in found] for name, found in addresses.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: entries)
    assert own_addresses(7, "1.2.3.4:9") == [
        "10.0.0.5:7",
        "[2001:db8::5]:7",
        "1.2.3.4:9",
        "172.17.0.1:7",
        "127.0.0.1:7",
    ]
