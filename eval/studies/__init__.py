"""What the parts of a build bring."""
