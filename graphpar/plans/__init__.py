"""The plan: built from a partition, checked, printed, saved, loaded, compared."""
