"""The host's time per step beside diffusers' schedulers."""
