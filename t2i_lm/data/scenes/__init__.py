"""Procedural scenes: generation, captions, and a checker that reads them back from pixels.

Data and reports spell "colour" and "grey", and so does the code that writes them.
"""
