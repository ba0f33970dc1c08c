"""The simulator: a world of virtual time that interprets the very machines that run in production."""
