"""Checks of exported graphs against PyTorch."""
