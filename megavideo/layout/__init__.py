"""Where tokens sit and who sees whom, in integers only."""
