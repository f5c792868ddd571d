"""What happens around training steps: checkpoints, pauses, averages, figures, samples."""
