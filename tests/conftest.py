"""Being here puts tests/ on sys.path, so that every test can `from cases import CASES`."""
