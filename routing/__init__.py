"""Where jobs go and how they survive: adverts, placement, supervision. Pure."""
