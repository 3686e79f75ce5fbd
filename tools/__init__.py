"""Command-line tools: thin, the work is in the packages."""
