"""Identity, token, transport, membership and plan: everything that makes several machines one mesh."""
