"""Learning from structures: losses, targets, replay, the update step, and a run's checkpoints."""
