"""Images from captions, and grids of them."""
