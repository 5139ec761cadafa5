"""The decoder and what is done to it: loading, expanding, freezing, sampling."""
