"""This machine: what its processor and links do, and timings of a model a moment before it is planned."""
