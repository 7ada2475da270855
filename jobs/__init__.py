"""Which run: the command line and the example jobs."""
