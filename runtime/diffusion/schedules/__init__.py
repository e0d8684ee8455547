"""Noise schedules: diffusers' and ComfyUI's."""
