"""What a run leaves: its folder, checkpoints, report, tracking, and what the terminal shows."""
