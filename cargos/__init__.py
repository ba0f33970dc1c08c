"""Cargos: manifest and catalogue (pure), fetching and storing of their files, and the runtimes that run them."""
