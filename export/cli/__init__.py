"""The command export-engines."""
