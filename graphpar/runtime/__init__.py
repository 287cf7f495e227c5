"""From a lowered graph and a schedule to running workers."""
