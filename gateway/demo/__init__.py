"""`archi demo`: a gateway and some Islands on this machine, each a process of its own, and a first answer."""
