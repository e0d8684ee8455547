"""The host's time per step, compared with diffusers' schedulers."""
