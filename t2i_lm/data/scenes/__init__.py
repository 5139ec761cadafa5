"""Generated scenes: layout, captions, images, and a checker that reads them back."""
