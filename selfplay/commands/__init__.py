"""The commands of `selfplay`, one file per group: parsing and printing only."""
