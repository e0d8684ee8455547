"""What whole runs are compared with: diffusers' pipelines, and ComfyUI's nodes and formulas written again in torch."""
