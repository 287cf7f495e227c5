"""What keeps model tracing and the compiler of the search apart."""

import threading

TRACING = threading.RLock()
"""Held while a model is traced and while a stage of the search is compiled in the background.

torch.export puts functions of its own in the place of `builtins.max` and `builtins.min` while it traces.
A compiler that looks these names up in another thread at that moment finds functions unknown to it, and
gives up.
"""
