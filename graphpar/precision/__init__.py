"""Number formats: which runs where, what errors it causes, and the search under an error budget."""
