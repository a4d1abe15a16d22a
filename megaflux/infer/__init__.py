"""Generation from the command line."""
