"""Scores of drawn scenes against their captions."""
