"""Training objectives, one file each, the loop readable top to bottom."""
