"""What runs on a machine with a GPU for minutes, what travels there, and what stands in for it elsewhere."""
