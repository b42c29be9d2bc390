"""Networking: identity, libp2p hosts, framed RPC, content-addressed blobs. Knows nothing of models."""
