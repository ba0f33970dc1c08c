"""The DHT over libp2p: address book, driver, peer cache. See docs/overlay.md."""
