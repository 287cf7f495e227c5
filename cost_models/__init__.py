"""The catalogue of cost models and hardware data; imported as `graphpar.cost_models` only."""

if __name__ != "graphpar.cost_models":
    raise ImportError(
        "This folder is a part of graphpar and is imported as graphpar.cost_models, "
        f"not as {__name__}; leave the repository's root out of the import, or install graphpar."
    )
