"""Training of reward LoRAs in plain torch. Importing this package imports nothing heavy; take what you need from its modules."""
