"""What runs a Cargo. `base` has the interface, each folder beside it one implementation."""
