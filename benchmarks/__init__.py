"""Studies: a folder for every question, what they share in ``lab``."""
