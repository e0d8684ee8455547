"""The scenes that the embedded pair draws, with captions."""
