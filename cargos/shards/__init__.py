"""Models by layers: what is in a GGUF file, how it is cut, where its bytes come from (docs/cargos.md)."""
