"""8-bit graphs from float ones: measured ranges, and two graphs over one set of 8-bit weights."""
