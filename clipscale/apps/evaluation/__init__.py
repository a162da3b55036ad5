"""``clipscale eval`` and ``clipscale results``: what a model scores on any data, stored, shown and compared."""
