"""Plugins for serving frameworks: one module per framework, which imports the framework only when it is called."""
