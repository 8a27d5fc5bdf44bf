"""One folder per experiment; every file has a get_config."""
