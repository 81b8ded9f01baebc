"""What the command line prints and completes."""
