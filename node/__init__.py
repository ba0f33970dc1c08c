"""The Island: libp2p network, RPC, job service, and the command `archi-node`."""
