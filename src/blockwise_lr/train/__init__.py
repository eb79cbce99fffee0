"""Configure and run one training."""
