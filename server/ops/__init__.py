"""Health, metrics, logs, traces and reloads."""
