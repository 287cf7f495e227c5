"""From a stock `nn.Module` and an example batch to a captured graph."""
