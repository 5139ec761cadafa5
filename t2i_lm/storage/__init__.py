"""Run folders, hub files, hashes, atomic and resumable files."""
