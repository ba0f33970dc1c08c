"""Cargos: manifest and catalogue (pure), fetching and storing of their files; runtimes that run them."""
