"""Coordinators, gossip and karma over libp2p: drivers of the machines in `routing` (docs/overlay.md)."""
