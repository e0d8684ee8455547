"""Where a model comes from: a folder, a Hub repository or a single file, and what its configs say."""
