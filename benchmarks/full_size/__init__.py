"""Exports and builds of models at SDXL's real size."""
