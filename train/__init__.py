"""The training loop and all that it needs: configuration, checkpoints, validation, records."""
