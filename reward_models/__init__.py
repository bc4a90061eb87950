"""Differentiable preference scorers in plain torch: HPSv2.1, MPS and the PAVRM head. Imports nothing; use the modules directly."""
