"""Low-rank adapters: their parameters, which Linears they go to, how they are installed, how they are written to disk."""
