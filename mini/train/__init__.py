"""Train the embedded pair."""
