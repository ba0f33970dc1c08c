"""One description of a network of peers, two networks that meet it: simulated, and real processes."""
