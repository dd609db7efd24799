"""The parts of scripts/mutation.py."""
