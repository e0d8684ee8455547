"""A bundle on disk: its manifest, its records and their digests."""
