"""Estimated lower bounds of latency from FLOPs, bytes and published rates."""
