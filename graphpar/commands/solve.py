"""`graphpar solve PROBLEM`: the command itself stands among what needs no torch."""

from graphpar.solve_command import solve as command

__all__ = ["command"]
