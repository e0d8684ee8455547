"""The folder that an export writes."""
