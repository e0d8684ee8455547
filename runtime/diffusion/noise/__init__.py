"""Noise with the values of torch and torchsde, drawn without torch."""
