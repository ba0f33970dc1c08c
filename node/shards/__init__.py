"""The node's part of chains: links of the ring, the machine over them, the shards that this Island holds."""
