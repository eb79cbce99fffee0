"""Analysis of existing models: their blocks, their sharpness, their loss on a text, and samples from them."""
