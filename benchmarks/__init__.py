"""Measurements of the toolkit at real sizes, each a separate program; no other package imports them."""
