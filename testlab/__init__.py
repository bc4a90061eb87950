"""Sweeps over a user's own workflow: plan, cells, grid video, report. Standard library, numpy, pillow and av only."""
