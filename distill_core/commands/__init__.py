"""What single commands do, print and complete."""
