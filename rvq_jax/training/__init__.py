"""State, step, loop, optimizer and checkpoints."""
