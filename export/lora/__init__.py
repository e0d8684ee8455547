"""LoRA files, and fusing them into a checkpoint's weights."""
