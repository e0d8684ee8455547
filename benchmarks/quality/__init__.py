"""Quality of a bundle's pictures against PyTorch, stage by stage."""
