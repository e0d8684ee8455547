"""Image files: reading, writing, metadata and contact sheets."""
