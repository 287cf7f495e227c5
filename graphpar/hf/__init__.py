"""Models of the transformers library: by name, built from their configuration, with inputs to match."""
