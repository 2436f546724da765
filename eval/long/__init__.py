"""What short windows do not show: distance by position, a needle in a long text, what is generated."""
