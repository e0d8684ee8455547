"""A request, and the same request resolved against a bundle."""
