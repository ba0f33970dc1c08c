"""Chains of Islands that hold one model together: planning them, and the ring that runs through them. Pure."""
