"""What the trained channels do: learned mixtures, and where temporal attention goes."""
