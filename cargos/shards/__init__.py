"""Parts of Cargos: files in pieces, models cut by layers."""
