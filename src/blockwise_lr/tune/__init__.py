"""Search the learning-rate ratios of a model on a small proxy, and report what the search decided."""
