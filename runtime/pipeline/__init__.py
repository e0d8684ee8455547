"""The stages of a run, from prompts to pictures."""
