"""Engines that draw completions, and the generators over them. Import the modules by name: this file stays light."""
