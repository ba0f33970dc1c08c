"""What the tests of chains share."""
