"""How every operator is split: exact reductions, dual bounds, local search, integer programmes."""
