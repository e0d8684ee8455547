"""Samplers: one function each, from sigmas to latents."""
