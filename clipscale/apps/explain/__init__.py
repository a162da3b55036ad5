"""``clipscale explain`` and ``clipscale explain-check``: what made a score, as a picture; and whether that is so."""
