"""The embedded default: a tiny model and a task whose answers a program can check."""
