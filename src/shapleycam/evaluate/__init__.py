"""How good maps are: the run over a data set, the paper's networks and numbers, the metrics."""
