"""OpenAI's HTTP API in terms of `gateway.service`: requests to `Work`, events to chunks."""
