"""Tensor groups: which devices may form one, how they share the model, what that costs."""
