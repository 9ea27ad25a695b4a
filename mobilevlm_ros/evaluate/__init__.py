"""Evaluates: recorded bags and the benchmarks of the paper, scored. Reaches the model only through the runtime."""
