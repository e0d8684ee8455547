"""Loading from cold: reading and checking a plan, and a timeline of a run with given rates."""
