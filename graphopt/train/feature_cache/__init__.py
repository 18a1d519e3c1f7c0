"""Features of a dropped prefix, cached: what is cached, where, and how training reads it."""
