"""Chains of Islands: who shall hold which layers, who was told, which chain takes a job (docs/sharding.md)."""
