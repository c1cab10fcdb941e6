"""What the course is made of beside the package: figures, and later widgets and checks."""
