"""Hosts behind the `Host` protocol: the Go libp2p daemon (default)."""
