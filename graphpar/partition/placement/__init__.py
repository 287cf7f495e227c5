"""Operators on accelerators and CPUs: the best split by ideals, for throughput and for latency."""
