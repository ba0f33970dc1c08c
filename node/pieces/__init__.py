"""Pieces of files between peers. See docs/network.md, "Weights from peers"."""
