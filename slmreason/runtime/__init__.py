"""Processes, signals, the backend and what may not be printed."""
