"""Who runs what: integer programmes over a table of numbers, and checkers that know no solver."""
