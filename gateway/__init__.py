"""The gateway: a peer that plays the coordinator role, with an OpenAI-compatible HTTP API on top."""
