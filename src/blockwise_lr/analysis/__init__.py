"""What an existing model is and does: its blocks, its sharpness, its loss on any text, a sample."""
