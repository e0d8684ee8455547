"""The machine outside the GPU: files, locks, memory, the console and text tables."""
