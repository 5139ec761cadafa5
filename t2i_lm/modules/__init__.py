"""LightningModules: one a task."""
