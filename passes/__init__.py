"""The catalogue of rewrite passes; each is a frozen dataclass whose fields are its options."""

if __name__ != "graphpar.passes":
    raise ImportError(
        f"This folder is the package graphpar.passes, but it was imported as {__name__!r}. "
        "Import it as graphpar.passes; take the project's root off sys.path if it is there."
    )
