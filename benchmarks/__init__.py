"""Measurements of the toolkit at real sizes, each a program of its own; nothing else imports them."""
