"""The pocket set: a small world, its oracle, and tiny trained models in the published Wan2.2 formats."""
