"""What the launchers check and write before a shell, ssh or a scheduler gets it."""
