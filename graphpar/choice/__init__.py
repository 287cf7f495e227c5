"""Which plan is taken: other orders of work, like pipelines, one device; all played through."""
