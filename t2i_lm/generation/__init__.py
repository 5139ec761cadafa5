"""Image generation: prompts, images, grids, folders of images, the demo's web page."""
