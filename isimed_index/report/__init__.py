"""Figures and tables drawn from results; nothing here reads a store."""
