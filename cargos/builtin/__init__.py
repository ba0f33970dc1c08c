"""Manifests that ship with the package, one TOML file each. Read by `cargos.resolve`."""
