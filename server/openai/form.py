"""The parts of an edit: its fields, its picture and its mask."""

__all__ = ["Form", "sorted_parts"]
