"""More than one device: DeepSpeed's ZeRO behind Lightning, and its sharded checkpoints."""
