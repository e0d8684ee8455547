"""ComfyUI workflows: reading them into requests, and writing requests as graphs."""
