"""Training: recipes, the loop, the optimizer and checkpoints. Knows losses and steps, not modalities."""
