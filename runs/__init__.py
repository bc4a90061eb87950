"""Background runs: their folders (`store`), their processes (`process`) and courtesy on a shared card (`lease`). No torch."""
