"""The figures of the embedded pair's model card."""
