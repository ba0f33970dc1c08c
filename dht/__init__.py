"""The distributed hash table: who is where, and who has what. Pure (docs/overlay.md)."""
