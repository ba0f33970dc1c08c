"""The simulator: a world of virtual time that interprets the machines that run in production (docs/simulator.md)."""
